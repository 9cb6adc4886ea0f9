"""What is built and installed; and the name `kernels`, which is also that of a package of Hugging Face's."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

LOAD_A_BERT = """
from transformers import BertConfig, BertModel
config = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
assert sum(p.numel() for p in BertModel(config).parameters()) > 0
"""


def _run(*arguments, cwd, **environment):
    result = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=os.environ | environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(pytestconfig, tmp_path_factory):
    """The names in a wheel built from a copy of the files that git knows or would add."""
    root = pytestconfig.rootpath
    if not (root / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("wheel")
    for name in filter(None, listed.split("\0")):
        if os.path.lexists(root / name):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, copy / name, follow_symlinks=False)
    assert (copy / "clinvla_fast" / "kernels").is_symlink()
    _run("-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), cwd=copy)
    (built,) = out.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        return set(archive.namelist())


def test_the_wheel_holds_every_module(wheel, pytestconfig):
    root = pytestconfig.rootpath
    for folder in ("clinvla_fast", "kernels", "training"):
        for path in (root / folder).rglob("*.py"):
            name = path.relative_to(root).as_posix()
            assert (f"clinvla_fast/{name}" if folder == "kernels" else name) in wheel


def test_the_wheel_holds_prompts_and_templates(wheel, pytestconfig):
    for kind in ("toml", "jinja"):
        found = list((pytestconfig.rootpath / "clinvla_fast").rglob(f"*.{kind}"))
        assert found and {path.relative_to(pytestconfig.rootpath).as_posix() for path in found} <= wheel


def test_the_wheel_holds_nothing_else(wheel):
    tops = {name.partition("/")[0] for name in wheel}
    metadata = {top for top in tops if top.endswith(".dist-info")}
    assert len(metadata) == 1 and tops - metadata == {"clinvla_fast", "training"}


def test_beside_hugging_faces_kernels(pytestconfig):
    """In the repository root, where a folder `kernels` of ours lies, `import kernels` is still theirs."""
    try:
        importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs Hugging Face's kernels (the test extra)")
    check = "import clinvla_fast; clinvla_fast.ClinVLA; import kernels; assert hasattr(kernels, 'get_kernel')"
    for code in (check + LOAD_A_BERT, LOAD_A_BERT + check):
        _run("-c", code, cwd=pytestconfig.rootpath)


@pytest.fixture
def without_hugging_faces_kernels(tmp_path):
    """Everything that is installed, but for that package: a folder of links to the rest."""
    for folder in (Path(p) for p in sys.path if Path(p).name in ("site-packages", "dist-packages")):
        for entry in folder.iterdir():
            ours = entry.name.startswith(("clinvla_fast", "__editable__"))
            theirs = entry.name == "kernels" or entry.name.startswith("kernels-")
            if not ours and not theirs and not (tmp_path / entry.name).exists():
                (tmp_path / entry.name).symlink_to(entry)
    return tmp_path


def test_without_hugging_faces_kernels(pytestconfig, without_hugging_faces_kernels):
    """Then the bare folder is what a probe for the name finds, and transformers must not take it for the package."""
    check = """
import importlib.metadata, importlib.util
found = importlib.util.find_spec("kernels")
assert found.origin is None and len(list(found.submodule_search_locations)) == 1, found
try:
    importlib.metadata.version("kernels")
except importlib.metadata.PackageNotFoundError:
    pass
else:
    raise AssertionError("Hugging Face's kernels is still there")
import clinvla_fast
clinvla_fast.ClinVLA
"""
    for code in (check + LOAD_A_BERT, LOAD_A_BERT + check):  # -S: no site-packages but the links
        _run("-S", "-c", code, cwd=pytestconfig.rootpath, PYTHONPATH=str(without_hugging_faces_kernels))
