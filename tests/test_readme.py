"""What the README tells people to type is what works."""

import re
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def block(name: str) -> str:
    return re.search(rf"<!-- {name} -->\n```\w+\n(.*?)```", README, re.DOTALL)[1].strip()


def test_the_example_runs(finished_run, tmp_path, monkeypatch):
    views = sorted((finished_run / "data").glob("test-*.tar"))
    subprocess.run(["tar", "xf", str(views[0]), "-C", str(tmp_path)], check=True)
    pictures = sorted(tmp_path.glob("*.jpg"))
    for name in ("frontal.png", "lateral.png", "other.png"):
        shutil.copy(pictures[0], tmp_path / name)  # the format is read from the content
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/001").symlink_to(finished_run)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(block("example"), names)
    assert names["similarity"].shape == (2, 2)
    assert names["similarity"].abs().max() <= 1 + 1e-5
    assert len(block("example").splitlines()) <= 10


def test_ci_runs_the_test_command_word_for_word():
    script = (ROOT / ".ci/run").read_text().replace('eval "$command"', "").replace("rm -rf .venv", "")
    printed = subprocess.run(["bash", "-c", script, ".ci/run"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == block("test command")
    assert "pytest" in block("test command")


def test_the_main_job_is_one_command():
    assert block("main job").endswith("python -m training.pretrain --compile")


def test_every_picture_is_there():
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / path).is_file()
