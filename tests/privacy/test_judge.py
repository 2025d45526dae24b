import torch
from tokmerge.models import zoo
from tokmerge.privacy.judge import Judge, classify, timm_judge, train_judge


def test_a_judge_learns_from_labels():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(3).repeat(32)
    images = torch.randint(0, 60, (96, 1, 12, 12), generator=generator, dtype=torch.uint8)
    for label in range(3):
        images[labels == label, :, 4 * label : 4 * label + 4] += 120
    torch.manual_seed(0)
    judge = train_judge(Judge(1, 3), images, labels, epochs=20, batch_size=32, lr=0.01, seed=0)
    assert not judge.training
    found = classify(judge, images.float() / 255, batch_size=50)
    assert (found == labels).float().mean() > 0.9
    again = Judge.of({name: value.half() for name, value in judge.state_dict().items()})
    assert torch.equal(classify(again, images.float() / 255), found)


def test_images_go_where_the_judge_lies():
    class Elsewhere(torch.nn.Linear):
        def forward(self, images):
            assert images.device.type == "meta"
            return torch.eye(3)[: len(images)]

    assert classify(Elsewhere(1, 1, device="meta"), torch.zeros(3, 1, 12, 12)).tolist() == [0, 1, 2]


def test_a_timm_judge_takes_pictures_and_normalises_them(monkeypatch):
    model = zoo.load_model("fashion-vit")
    monkeypatch.setattr(zoo, "load_model", lambda name: model)
    images = torch.rand(4, 1, 28, 28)
    with torch.inference_mode():
        expected = model((images - zoo.FASHION_MEAN) / zoo.FASHION_STD)
        torch.testing.assert_close(timm_judge("any", "cpu")(images), expected)
