"""What is trained is what is served: a recipe whose model differs from the engine's in anything
ships filters that were never measured."""

from __future__ import annotations

import json
import math
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pace
import pytest
import recall
import retrofit
import runs
import scratch
import served
import study
import torch
from conv_model import PLACES, ConvModel, load, save
from convserve.engine import LLM
from convserve.engine.models import ModelError
from golden import GOLDEN
from loop import Plan, Windows, head_loss, head_of, mean_loss, read_ids, train
from tiny_models import config_of, naive_logits, write_model

SMALL = (
    "--vocab 64 --hidden 32 --layers 2 --heads 2 --inner 48 --batch 8 --length 24 --steps 25 "
    "--lr 1e-2 --device cpu --dtype float32 --no-compile --eval-windows 8"
)


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token ids in which the next one can be learnt."""
    path = tmp_path_factory.mktemp("ids") / "ids.npy"
    steps = np.random.default_rng(0).integers(1, 3, 4000)
    np.save(path, (np.cumsum(steps) % 64).astype(np.uint16))
    return path


def served_loss(folder: Path, ids: Path, windows: int, length: int, **options: Any) -> float:
    """Mean loss of the engine over the windows that `mean_loss` takes."""
    tokens = np.load(ids).astype(int)
    starts = torch.linspace(0, len(tokens) - length - 1, windows).long().tolist()
    llm = LLM(folder, dtype="float32", memory="16MiB", **options)
    scores = llm.score([tokens[s : s + length + 1].tolist() for s in starts])
    return -float(np.mean([p for row in scores for p in row if p is not None]))


@pytest.mark.parametrize(
    "kind",
    [
        "--kind none",
        "--kind static",
        "--kind headwise --size 8",
        "--kind lowrank --size 3",
        f"--kind lowrank --size 3 --placement {' '.join(PLACES)}",
        "--kind lowrank --size 3 --experts 3 --inner 16",
    ],
)
def test_a_model_from_scratch_learns_and_is_served_with_the_same_loss(
    kind: str, ids: Path, tmp_path: Path
) -> None:
    tokenizer = Path(__file__).parents[1] / "data" / "tokenizer" / "tokenizer.json"
    flags = f"{tmp_path} --train {ids} --tokenizer {tokenizer} --eval held={ids} {SMALL} {kind}"
    [after] = scratch.main(scratch.arguments().parse_args(flags.split()))
    loss = math.log(after["held"])
    assert loss < math.log(64) - 0.2
    folder = tmp_path / "seed-0" / "model"
    assert served_loss(folder, ids, 8, 24) == pytest.approx(loss, abs=1e-5)
    result = json.loads((tmp_path / "seed-0" / "result.json").read_text())
    assert result["tokens"] == 25 * 8 * 24
    assert len((tmp_path / "seed-0" / "curve.csv").read_text().splitlines()) == 26


@pytest.mark.parametrize(
    "variant",
    ["plain", "lowrank qkv", "headwise all", "static", "conv first, full", "biases", "experts"],
)
def test_the_model_is_the_definition(variant: str, tmp_path: Path) -> None:
    config, tokens = config_of(variant), list(range(3, 30))
    config["conv"]["bias"] = True
    weights = write_model(tmp_path, config)
    model = load(tmp_path)
    got = model.logits(model(torch.tensor([tokens]), torch.float32))[0]
    torch.testing.assert_close(
        got.double(), naive_logits(config, weights, tokens), atol=1e-3, rtol=0
    )


@pytest.mark.parametrize("family", ["hf_lfm2", "hf_mamba2", "hf_qwen3_next", "jet_nemotron_tiny"])
def test_other_families_are_refused_by_name(family: str) -> None:
    with pytest.raises(ModelError, match="Llama-shaped models only, not"):
        load(GOLDEN / "models" / family)


@pytest.mark.parametrize("variant", ["block norm", "some layers", "silu and scale"])
def test_what_is_not_trained_is_refused(variant: str, tmp_path: Path) -> None:
    write_model(tmp_path, config_of(variant))
    with pytest.raises(ModelError, match="the recipes train"):
        load(tmp_path)


def test_experts_with_a_shared_one_are_refused(tmp_path: Path) -> None:
    config = config_of("experts") | {"shared_expert_intermediate_size": 8}
    with pytest.raises(ModelError, match="the recipes train"):
        ConvModel(config)
    args = scratch.arguments().parse_args(
        ["o", "--train", "t", "--tokenizer", "t", "--experts", "2"]
    )
    plain = ConvModel(scratch.config_of(args))
    with pytest.raises(ModelError, match="inside experts"):
        plain.add_sites("lowrank", ["up"], 4, 4)


def retrofitted(base: Path, out: Path, ids: Path, flags: str) -> dict[str, float]:
    common = f"{base} {out} --train {ids} --eval held={ids} --batch 4 --length 24 --device cpu"
    common += " --dtype float32 --no-compile --eval-windows 8 --size 4 --lr 1e-2"
    return retrofit.main(retrofit.arguments().parse_args(f"{common} {flags}".split()))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, ids: Path) -> Path:
    """A plain model that has learnt a little."""
    torch.manual_seed(0)
    flags = f"nowhere --train {ids} --tokenizer none {SMALL}"
    model = ConvModel(scratch.config_of(scratch.arguments().parse_args(flags.split())))
    folder = tmp_path_factory.mktemp("base")
    save(model, folder)
    return folder


@pytest.mark.parametrize("kind", ["static", "headwise", "lowrank"])
def test_an_adapter_starts_as_the_base_and_is_served_with_the_trainers_loss(
    kind: str, base: Path, ids: Path, tmp_path: Path
) -> None:
    retrofitted(base, tmp_path / "start", ids, f"--kind {kind} --steps 0")
    plain = served_loss(base, ids, 7, 512)
    assert served_loss(base, ids, 7, 512, conv_adapter=tmp_path / "start") == pytest.approx(plain)
    after = retrofitted(base, tmp_path / "end", ids, f"--kind {kind} --steps 10")
    served = served_loss(base, ids, 7, 512, conv_adapter=tmp_path / "end")
    assert served == pytest.approx(math.log(after["held"]), abs=1e-4)
    assert served < plain - 0.01


def test_a_lora_is_merged_and_all_weights_make_a_whole_folder(
    base: Path, ids: Path, tmp_path: Path
) -> None:
    for flags in (
        "--kind none --lora 4",
        "--kind lowrank --lora 2",
        "--kind lowrank --weights all",
    ):
        after = retrofitted(base, tmp_path, ids, f"{flags} --steps 10")
        served = served_loss(tmp_path / "model", ids, 7, 512)
        assert served == pytest.approx(math.log(after["held"]), abs=2e-3), flags


def test_an_anchor_holds_the_model_to_its_base(base: Path, ids: Path, tmp_path: Path) -> None:
    def moved(flags: str) -> float:
        retrofitted(base, tmp_path, ids, f"--steps 20 --kind lowrank {flags}")
        llm = LLM(base, dtype="float32", memory="16MiB", conv_adapter=tmp_path)
        new, old = (m.score([list(range(60))])[0][1:] for m in (llm, LLM(base, memory="16MiB")))
        return float(np.mean([abs((a or 0) - (b or 0)) for a, b in zip(new, old, strict=True)]))

    other = tmp_path / "other.npy"
    np.save(other, np.tile(np.arange(60, dtype=np.uint16), 20))
    free = moved("")
    held = moved(f"--anchor {other} --anchor-share 0.5 --anchor-weight 20")
    assert held < 0.5 * free


def test_a_run_that_was_cut_off_goes_on_as_if_it_had_not_been(
    base: Path, ids: Path, tmp_path: Path
) -> None:
    def run(out: Path, fail_at: int | None) -> ConvModel:
        torch.manual_seed(1)
        model = load(base)
        windows = Windows(read_ids(ids, torch.device("cpu")), 24, 0)
        steps = 0

        def loss_of() -> torch.Tensor:
            nonlocal steps
            if steps == fail_at:
                raise KeyboardInterrupt
            steps += 1
            tokens = windows.take(2)
            hidden = model(tokens[:, :-1], torch.float32)
            return head_loss(hidden, head_of(model), tokens[:, 1:])

        plan = Plan(steps=8, batch=2, length=24, lr=1e-2, warmup=2, save_every=3)
        train(model, list(model.parameters()), plan, loss_of, [windows.generator], out)
        return model

    whole = run(tmp_path / "whole", None)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", 5)
    resumed = run(tmp_path / "cut", None)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    rows = (tmp_path / "cut" / "curve.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows[1:]] == [str(step) for step in range(1, 9)]


def test_windows_of_a_seed_are_always_the_same(ids: Path) -> None:
    tokens = read_ids(ids, torch.device("cpu"))
    one, same, other = (Windows(tokens, 8, seed).take(4) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    with pytest.raises(ValueError, match="too few"):
        Windows(tokens[:9], 8, 0)


def test_a_loss_over_few_windows_is_the_mean_over_their_tokens(base: Path, ids: Path) -> None:
    tokens = read_ids(ids, torch.device("cpu"))
    model = load(base)
    single = mean_loss(model, tokens, 24, 5, torch.float32, batch=1)
    assert mean_loss(model, tokens, 24, 5, torch.float32) == pytest.approx(single)


def test_every_flag_of_the_study_is_one_that_its_script_knows() -> None:
    args = study.arguments().parse_args(["out", "--part", "scratch", "retrofit"])
    scripts = {"retrofit": retrofit, "scratch": scratch, "recall": recall, "served": served}
    trained = [*runs.scratch_runs(args), *runs.retrofit_runs(args)]
    again = [r for run in trained if (r := runs.served_run(run, args)) is not None]
    for run in (*trained, *runs.recall_runs(args), *again):
        words = run.words(Path("out"), run.rate)
        scripts[run.script].arguments().parse_args(words)


def test_the_study_goes_on_at_the_rate_of_the_best_trial_and_keeps_what_is_done(
    tmp_path: Path,
) -> None:
    flags = f"{tmp_path / 'out'} --part retrofit --work {tmp_path / 'work'} --seconds 1"
    whole = study.Study(study.arguments().parse_args(flags.split()))
    [run] = [r for r in whole.gpu if r.name == "retrofit/lora/0"]
    losses, rates = (9.2, 9.1, 9.3, 9.4), (1e-3, 2e-3, 4e-3, 8e-3)
    for name, loss, rate in zip(run.trials, losses, rates, strict=True):
        whole.done[name].set()
        folder = whole.args.work / name
        folder.mkdir(parents=True)
        result = {"after": {"held-out": loss}, "arguments": {"lr": rate}}
        (folder / "result.json").write_text(json.dumps(result))
    assert whole.best_rate(run) == "0.002"
    study.pack(whole.args.work, whole.args.out)
    with tarfile.open(whole.args.out / "figures.tar.gz") as archive:
        assert archive.getnames() == [f"{name}/result.json" for name in run.trials]
    whole.run()  # no run could end in a second, so none is begun
    assert not (whole.args.work / run.name).exists()


def test_a_study_that_is_started_again_does_not_train_again_what_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = f"{tmp_path / 'out'} --part scratch --work {tmp_path / 'work'} --seconds 1 --cut"
    whole = study.Study(study.arguments().parse_args(flags.split()))
    for run in whole.gpu:
        for script in ("scratch", "served"):
            mark = whole.args.work / run.name / f"{script}.done"
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()
    again = whole.gpu[0]
    (whole.args.work / again.name / "scratch.done").unlink()
    whole.run()
    [line] = capsys.readouterr().out.splitlines()
    assert "scratch/none/0: not begun" in line


def test_every_kind_is_served_when_its_pace_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = "--vocab 64 --hidden 32 --layers 1 --heads 2 --inner 32"
    words = [tmp_path / "out.json", "--engines", tmp_path, "--flags", flags, "--device", "cpu"]
    words += ["--streams", "1", "2", "--new-tokens", "2", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["pace.py", *map(str, words)])
    pace.main()
    groups = json.loads((tmp_path / "out.json").read_text())
    assert [row["model"] for row in groups["small"]] == list(runs.SCRATCH)
    assert [row["model"] for row in groups["experts"]] == list(runs.MIXTURES)
    assert all(row["decode, 2"] > 0 for rows in groups.values() for row in rows)
