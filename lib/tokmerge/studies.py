"""`python -m tokmerge.studies [paper] [stage ...]`: run frozen stages, which `dvc repro` passes over.

Each stage's command runs as dvc would run it, from the repository; then dvc.lock is told what it read and wrote.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from tokmerge import paths


def run(root: Path, profile: str = "embedded", names: Sequence[str] = ()) -> None:
    """Run frozen stages, one after the other, in the order of the pipeline.

    Args:
        root: the repository.
        profile: "embedded" or "paper".
        names: of stages; all that are frozen if there are none.

    Raises:
        ValueError: a name is that of no frozen stage.
        subprocess.CalledProcessError: a stage or `dvc commit` failed; later stages have not run.
    """
    pipeline = "dvc.yaml" if profile == "embedded" else f"params/{profile}/dvc.yaml"
    stages = yaml.safe_load((root / pipeline).read_text())["stages"]
    frozen = [name for name, stage in stages.items() if stage.get("frozen")]
    if unknown := set(names) - set(frozen):
        raise ValueError(f"no frozen stage {', '.join(sorted(unknown))} in {pipeline}: use {', '.join(frozen)}")
    for name in [name for name in frozen if not names or name in names]:
        print(f"{pipeline}:{name}", flush=True)
        subprocess.run(["bash", "-c", stages[name]["cmd"]], cwd=root, check=True)
        subprocess.run([sys.executable, "-m", "dvc", "commit", "-f", f"{pipeline}:{name}"], cwd=root, check=True)


def main() -> None:
    """Run them; exit with one line if a name is wrong or a stage fails."""
    parser = argparse.ArgumentParser(prog="python -m tokmerge.studies", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("profile", nargs="?", default="embedded", choices=("embedded", "paper"))
    parser.add_argument("stage", nargs="*", help="only these (default: all that are frozen)")
    given = parser.parse_args()
    try:
        run(paths.root(), given.profile, given.stage)
    except (ValueError, subprocess.CalledProcessError) as error:
        sys.exit(f"studies: {error}")


if __name__ == "__main__":
    main()
