from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image

from companion.data_tools.scienceqa import Problem
from companion.evaluation import ensemble
from companion.plots import chapters_train as show
from llava_core.checkpoints.load import Loaded, build
from llava_core.config import RunConfig, load_experiment
from llava_core.data.instruct import Sample
from llava_core.ops.transformers_backend import packed_attention
from llava_core.train.loader import Loader
from llava_core.train.trainer import Trainer, TrainingSet


@pytest.fixture
def loaded(tmp_path: Path) -> Loaded:
    return build(*tiny.base_models(tmp_path), torch.float32)


@pytest.fixture
def config() -> RunConfig:
    return load_experiment("pretrain", "mini", {"train.max_length": 128})


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    made = []
    for k in range(5):
        path = tmp_path / f"{k}.png"
        Image.new("RGB", (32, 32), (50 * k, 255 - 50 * k, 40)).save(path)
        made.append(Sample(str(k), [("what is the color\n<image>", "red car" * (k + 1))], path))
    return made


def test_config_rows_name_every_departure_and_no_unused_setting(config: RunConfig) -> None:
    rows = {row["setting"]: row for row in show.config_rows(config)}
    assert {d.field.removeprefix("scale.") for d in config.departures} <= rows.keys()
    assert rows["train.learning_rate"]["paper"] == "0.002" != rows["train.learning_rate"]["here"]
    assert "App. C" in rows["train.learning_rate"]["where it stands, why it differs"]
    assert "data.prompt_format" not in rows


@pytest.mark.parametrize(
    ("experiment", "moving"),
    [("pretrain", {"multi_modal_projector"}), ("finetune", {"multi_modal_projector", "language_model"})],
)
def test_what_moves_is_what_the_stage_trains(
    experiment: str, moving: set[str], loaded: Loaded, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_experiment(experiment, "mini", {"train.max_length": 128})
    loaded.model.set_trainable(config.experiment.train.trainable)
    monkeypatch.setattr(show, "build_model", lambda *_: loaded)
    rows = show.what_moves(config, samples)
    assert {row["part"] for row in rows if row["that moved"]} == moving
    assert sum(row["parameters"] for row in rows) == sum(p.numel() for p in loaded.model.parameters())


def test_sample_losses_add_up_to_the_trainers_held_out_loss(
    loaded: Loaded, config: RunConfig, samples: list[Sample]
) -> None:
    sums, counts = show.sample_losses(loaded, config, samples)
    trainer = object.__new__(Trainer)
    trainer.model, trainer.loaded, trainer.scale = loaded.model, loaded, config.scale
    trainer.device = torch.device("cpu")
    held_out = TrainingSet(samples, loaded.tokenizer, loaded.processor, config, loaded.model.n_image_tokens)
    trainer.held_out, trainer.held_out_loader = held_out, Loader(held_out, 512)
    assert len(sums) == len(counts) == 5
    with packed_attention(loaded.model.language_model):
        assert sums.sum() / counts.sum() == pytest.approx(trainer.heldout_loss(), rel=1e-5)


def test_with_other_images_leaves_no_sample_its_own(samples: list[Sample]) -> None:
    other = show.with_other_images(samples)
    assert all(a.image != b.image and a.turns == b.turns for a, b in zip(samples, other, strict=True))


def test_attention_has_one_map_per_token_and_shares_of_one(loaded: Loaded, samples: list[Sample]) -> None:
    tokens, maps = show.answer_attention(loaded, show.load_image(samples[0].image), "what color", 3)
    assert maps.shape == (len(tokens), 2, 2)
    assert (maps > 0).all()
    assert (maps.sum((1, 2)) < 1).all()


def test_covered_counts_parts_of_patches() -> None:
    assert show._covered((0.0, 0.0, 0.75, 0.5), 2).tolist() == [[1.0, 0.5], [0.0, 0.0]]


def _review(question: int, category: str, scores: tuple[float, float] | None) -> dict[str, object]:
    content = f"{scores[0]} {scores[1]}\nwhy" if scores else "no scores"
    return {
        "question_id": question,
        "category": category,
        "content": content,
        "tuple": list(scores) if scores else None,
    }


def test_bench_rows_score_each_category_beside_its_claim() -> None:
    reviews = [_review(0, "conv", (10, 5)), _review(1, "conv", (10, 10)), _review(2, "detail", (8, 2))]
    reviews.append(_review(3, "detail", None))
    rows = show.bench_rows({("COCO", "m"): reviews, ("wild", "m"): reviews}, {("COCO", "m"): "bench-coco-full"})
    found = {(r["bench"], r["questions"]): r for r in rows}
    assert found["COCO", "conv"]["relative score (%)"] == pytest.approx(75)
    assert found["COCO", "detail"]["n"] == found["COCO", "detail"]["judge failed"] == 1
    low, high = found["COCO", "all"]["95 % interval"]
    assert low <= found["COCO", "all"]["relative score (%)"] <= high
    assert [found["COCO", kind]["published (%)"] for kind in ("all", "conv")] == [85.1, 83.1]
    assert found["wild", "all"]["published (%)"] is None


def _problem(key: str, answer: int, image: Path | None = None) -> Problem:
    choices = ["one", "two", "three", "four"][: 2 + answer]
    return Problem(key, "Which?", choices, answer, "", image, "", "", "natural science", 1, "test")


def test_science_baselines_count_guess_position_and_answers() -> None:
    problems = [_problem("1", 0, Path("x.png")), _problem("2", 1), _problem("3", 1)]
    answers = {"m": {"1": "The answer is A.", "2": "The answer is A.", "3": "B"}}
    rows = {row["questions"]: row for row in show.science_baselines(problems, [_problem("4", 1)], answers)}
    assert rows["all"]["usual position"] == rows["all"]["m"] == pytest.approx(200 / 3)
    assert rows["with an image"]["blind guess"] == 50
    assert rows["without"]["n"] == 2


def test_a_difference_has_its_interval_and_a_system_its_published_number() -> None:
    problems = [_problem(str(k), 0) for k in range(20)]
    first, second = ({p.id: "B" if k < n else "A" for k, p in enumerate(problems)} for n in (15, 5))
    found = show.difference_of(problems, first, second)
    assert (found["n"], found["effect"]) == (20, pytest.approx(50))
    assert 0 < found["interval"][0] < 50 < found["interval"][1]
    rows = {row["system"]: row for row in show.ensemble_rows(ensemble.evaluate(problems, first, second, {}))}
    assert rows["llava"]["published (%)"] == 90.92
    assert rows["judge"]["published (%)"] == 92.53
    assert rows["llava"]["minus LLaVA"] is None
    assert rows["gpt4"]["its interval"] == pytest.approx(found["interval"])


def test_cards_escape_what_was_said() -> None:
    text = show.cards([Image.new("RGB", (8, 8))], [[("LLaVA", "<b>bold</b>")]]).data
    assert "<b>bold" not in text
    assert "&lt;b&gt;bold" in text
