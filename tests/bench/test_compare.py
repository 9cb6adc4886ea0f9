"""Two revisions in processes of their own: each from its own tree, and a planted slow-down is seen."""

import shutil
import subprocess
from pathlib import Path

import pytest

from bench import compare
from bench.compare import Result, Unmeasured, Worker, compared, tree_of
from bench.measure import Ratio

ROOT = Path(__file__).parents[2]
CASE = "sigmoid loss"


def git(*arguments, root):
    told = ["git", "-c", "user.name=Test", "-c", "user.email=test@example.org", *arguments]
    return subprocess.run(told, cwd=root, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A commit of what is here, one whose sigmoid loss waits, and one in which it is missing."""
    root = tmp_path_factory.mktemp("repository") / "root"
    cached = shutil.ignore_patterns("__pycache__", ".*", "results", "build", "*.egg-info")
    for folder in ("clinvla_fast", "kernels", "bench"):
        shutil.copytree(ROOT / folder, root / folder, symlinks=True, ignore=cached)
    git("init", "--quiet", root=root)
    ops = root / "clinvla_fast" / "ops.py"
    as_it_is = ops.read_text()
    slow = "\n\n_quick = sigmoid_contrastive\n\n\ndef sigmoid_contrastive(*arguments):\n    import time\n\n"
    slow += "    time.sleep(1)\n    return _quick(*arguments)\n"
    for tag, text in (("quick", ""), ("slow", slow), ("without", "\n\ndel sigmoid_contrastive\n")):
        ops.write_text(as_it_is + text)
        git("add", "--all", root=root)
        git("commit", "--quiet", "--message", tag, root=root)
        git("tag", tag, root=root)
    git("checkout", "--quiet", "quick", root=root)
    return root


def results(repository, *revisions):
    return list(compared(revisions, [CASE], device="cpu", rounds=3, root=repository))


def test_the_same_twice(repository):
    [result] = results(repository, "quick", git("rev-parse", "--short", "HEAD", root=repository))
    assert result.reason == "" and 0.2 < result.ratio.value < 5
    assert len(git("worktree", "list", root=repository).splitlines()) == 1


def test_a_slow_down_is_seen(repository):
    [result] = results(repository, "slow", ".")
    assert result.ratio.value > 2 and result.verdict == "FASTER"
    assert Result(CASE, Ratio(0.8, 0.1)).verdict == "SLOWER" and Result(CASE, Ratio(0.8, 0.3)).verdict == ""


def test_what_a_revision_cannot_run(repository):
    [result] = results(repository, "quick", "without")
    assert result.ratio is None and result.reason.startswith("B (without) cannot run it: ")
    assert "sigmoid_contrastive" in result.reason


def test_a_process_that_dies_is_started_again(repository, tmp_path):
    worker = Worker(tmp_path, "cpu", str(tmp_path))
    for _ in range(2):
        with pytest.raises(Unmeasured, match=f"its process ended: clinvla_fast is .*: expected that of {tmp_path}"):
            worker.ask(make=CASE)


def test_worktrees_go(repository):
    with pytest.raises(KeyboardInterrupt), tree_of("quick", repository) as tree:
        assert (tree / "clinvla_fast" / "kernels" / "launch.py").is_file()
        raise KeyboardInterrupt
    assert not tree.exists() and len(git("worktree", "list", root=repository).splitlines()) == 1


def test_mistakes(capsys):
    with pytest.raises(SystemExit, match="there is no revision 'nonsense' here: expected a commit, a tag"):
        compare.main(["nonsense", "."])
    with pytest.raises(SystemExit):
        compare.main(["HEAD", ".", "-k", "no such case"])
    assert "some of the cases invertible adapter" in capsys.readouterr().err
