# The smoke profile in two lanes (-s: a stage by itself, what it reads is there). The last line checks all of them, runs
# what is left, or what failed in a lane, and fails if that fails.
lane() { dvc --wait-for-lock repro -s $(printf "%s@smoke " "$@"); }
lane train_vit_chained train_llava_chained questions_study_chained questions &
lane inputs search images_study_chained
wait
lane channel_study_chained channel search_study_chained &
lane privacy_study_chained privacy images merging
wait
dvc repro --glob '*@smoke'
