"""The command line: flags become settings, wrong ones fail, and errors are one line.

Breaks for: operators, who would otherwise serve with options they did not ask for.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from convserve.server import serve as serve_module
from convserve.server.cli import app
from typer.testing import CliRunner

if TYPE_CHECKING:
    from convserve.engine.config import EngineConfig
    from convserve.server.serve import ListenOptions
    from convserve.server.settings import ServerSettings

FOLDER = str(Path(__file__).parents[1] / "data" / "tokenizer")


class Served:
    """What `run` was called with."""

    engine: EngineConfig
    settings: ServerSettings
    listen: ListenOptions
    code = 0

    def run(self, engine: Any, settings: Any, listen: Any) -> int:
        self.engine, self.settings, self.listen = engine, settings, listen
        return self.code


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Served:
    made = Served()
    monkeypatch.setattr(serve_module, "run", made.run)
    monkeypatch.setattr("convserve.server.logs.configure_logging", lambda *_, **__: None)
    for name in ("CONVSERVE_API_KEY", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    return made


def invoke(*words: str) -> Any:
    return CliRunner().invoke(app, words)


def test_flags_become_settings(served: Served) -> None:
    words = [
        *("serve", FOLDER, "--host", "::1", "--port", "0", "--device", "cpu", "--dtype", "float32"),
        *("--max-num-seqs", "7", "--max-batch-tokens", "99", "--max-model-len", "300"),
        *("--memory", "1GiB", "--page-size", "32", "--threads", "2", "--backend", "reference"),
        *("--served-model-name", "a", "--served-model-name", "b", "--max-queue", "3"),
        *("--max-body", "5000", "--keep-alive-seconds", "2", "--drain-seconds", "4"),
        *("--deadline-seconds", "8", "--no-vllm-metrics", "--open-metrics", "--api-key", "k"),
        *("--cors-origin", "https://x", "--no-prefix-caching", "--conv-tail-memory", "2%"),
        *("--no-page", "--otlp-traces-endpoint", "http://c:4318/v1/traces"),
    ]
    served.code = 3
    assert invoke(*words).exit_code == 3
    engine, settings, listen = served.engine, served.settings, served.listen
    assert (engine.model, engine.device, engine.dtype, engine.memory) == (
        FOLDER, "cpu", "float32", "1GiB",
    )  # fmt: skip
    assert (engine.max_num_seqs, engine.max_batch_tokens, engine.max_model_len) == (7, 99, 300)
    assert (engine.page_size, engine.threads, engine.backend) == (32, 2, "reference")
    assert (engine.prefix_caching, engine.conv_tail_memory) == (False, "2%")
    assert settings.model_names == ("a", "b")
    assert (settings.max_queue, settings.max_body, settings.keep_alive_seconds) == (3, 5000, 2)
    assert (settings.deadline_seconds, settings.vllm_metrics) == (8, False)
    assert (settings.api_keys, settings.metrics_need_key) == (("k",), False)
    assert settings.cors_origins == ("https://x",)
    assert (settings.page, settings.otlp_traces_endpoint) == (False, "http://c:4318/v1/traces")
    assert (listen.host, listen.port, listen.drain_seconds) == ("::1", 0, 4)


def test_a_server_is_local_and_named_after_its_folder_by_default(served: Served) -> None:
    assert invoke("serve", FOLDER).exit_code == 0
    assert served.listen.host == "127.0.0.1"
    assert served.settings.model_names == ("tokenizer",)
    assert served.settings.page
    assert served.settings.otlp_traces_endpoint is None
    assert served.settings.cors_origins == served.settings.api_keys == ()


def test_keys_come_from_flags_environment_and_file(
    served: Served, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "keys"
    file.write_text("f1\n\n f2 \n")
    monkeypatch.setenv("CONVSERVE_API_KEY", "e1,e2 a")
    words = ("--api-key", "a", "--api-key", "b", "--api-key-file", str(file))
    assert invoke("serve", FOLDER, *words).exit_code == 0
    assert served.settings.api_keys == ("a", "b", "e1", "e2", "f1", "f2")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["serve", FOLDER, "--nope"], 2, "No such option"),
        (["serve", FOLDER, "--max-queue", "-1"], 2, "--max-queue"),
        (["serve", FOLDER, "--dtype", "int8"], 2, "--dtype"),
        (["serve", FOLDER, "extra"], 2, "extra"),
        (["serve", FOLDER, "--log-level", "loud"], 2, "--log-level"),
        (["serve", "/no/such/folder"], 1, "/no/such/folder: no such folder"),
        (["serve", "/no/such.gguf"], 1, "/no/such.gguf: No such file"),
        (["serve", FOLDER, "--api-key", ""], 1, "an API key must be"),
        (["serve", FOLDER, "--api-key", "a b"], 1, "an API key must be"),
        (["serve", FOLDER, "--api-key-file", "/no/file"], 1, "--api-key-file /no/file"),
        (["serve", FOLDER, "--api-key-file", "/dev/null"], 1, "has no key"),
        (["serve", FOLDER, "--ssl-certfile", "c"], 1, "go together"),
        (["generate", "/no/such/folder", "x"], 1, "no such folder"),
        (["inspect", "/no/such/folder"], 1, "no such folder"),
        (["inspect", FOLDER], 1, "config.json"),
        (["generate", FOLDER, "x"], 1, "config.json"),
        (["import-gguf", "/no/such.gguf", "/no/out"], 1, "/no/such.gguf"),
    ],
    ids=str,
)
def test_what_is_wrong_is_said_in_one_line(
    served: Served, words: list[str], code: int, said: str
) -> None:
    result = invoke(*words)
    assert result.exit_code == code
    assert said in result.stderr
    if code == 1:
        assert result.stderr.count("\n") == 1
    assert not hasattr(served, "settings")


def test_serving_loads_no_torch() -> None:
    source = (
        "import sys; import convserve.server.app, convserve.server.serve, convserve.server.cli; "
        "import convserve.server.default_model; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'triton')))"
    )
    assert subprocess.run([sys.executable, "-c", source], timeout=60).returncode == 0


def test_the_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "convserve.server", "--help"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0
    assert "import-gguf" in done.stdout
