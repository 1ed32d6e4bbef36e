"""The evidence bundle of a finished run: what a reader needs to check its numbers, without the weights.

A folder or ZIP file with the files of the record, the checkpoint's manifest (SHA-256 of the weights), the cards of the
data, the right answers of the questions that were asked, and `evidence.json`: the SHA-256 of each file and the claims
of the paper that the run measures.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import shutil
import stat
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic_core import to_jsonable_python

from companion.data_tools.data_card import CARD, TWIN
from companion.data_tools.scienceqa import load_problems
from companion.evaluation.llava_bench import score_reviews
from companion.evaluation.science_qa import Question, as_questions, score
from companion.paper.claims import all_claims
from companion.paper.verdict import verdict_of_value
from llava_core.checkpoints.files import atomic_folder, contained_file
from llava_core.config import META, ExperimentConfig, load_scale, published_experiment
from llava_core.config_files import field_names, value_of
from llava_core.record import RunRecord, final_loss
from llava_core.runtime import (
    CompanionError,
    DataError,
    atomic_write,
    display_path,
    fingerprint,
    read_json,
    read_jsonl,
    sha256_file,
    write_json,
)

FORMAT_VERSION = 1
INDEX, MANIFEST, QUESTIONS = "evidence.json", "checkpoint/manifest.json", "questions.json"
REQUIRED = ("config.yaml", "environment.json", "metrics.jsonl", "summary.json", MANIFEST)
FACTS = ("run", "experiment", "scale", "hardware", "date")
MAX_BYTES = 50_000_000  # of a bundle, besides its answers
MAX_UNPACKED = 1_000_000_000


class Bundle(RunRecord):
    """The folder of an unpacked bundle, which has the layout of a record."""

    @functools.cached_property
    def index(self) -> dict[str, Any]:
        return dict(read_json(self.path / INDEX))

    @functools.cached_property
    def manifest(self) -> dict[str, Any]:
        return dict(read_json(self.path / MANIFEST))

    @functools.cached_property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of training steps."""
        return [row for row in self.metrics() if "loss" in row]

    @functools.cached_property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.summary["samples"] / self.config.experiment.train.global_batch)

    @property
    def steps(self) -> int:
        return self.steps_per_epoch * self.config.experiment.train.epochs

    @functools.cached_property
    def results(self) -> dict[str, dict[str, Any]]:
        """Stored results of evaluations, by name."""
        files = {path.stem: read_json(path) for path in sorted(self.path.glob("*.json"))}
        return {name: r for name, r in files.items() if isinstance(r, dict) and "measured_with" in r}

    def claims(self) -> list[dict[str, Any]]:
        """The claims that the run measures; a value is compared only if the run has no departure from the paper."""
        numbers: dict[str, dict[str, Any]] = {"summary": {"all": {"value": self.summary["seconds"] / 3600}}}  # hours
        for name, result in self.results.items():
            if "subsets" in result:
                parts = {"all": result, **result["subsets"]}
                numbers[name] = {key: {**part, "value": part["accuracy"]} for key, part in parts.items()}
            elif "categories" in result:
                parts = {"all": result["all"], **result["categories"]}
                numbers[name] = {key: {"value": value} for key, value in parts.items()}
        rows = []
        for known in all_claims().values():
            experiment, _, name = (known.against.bundle or "").partition("/")
            part = known.against.where.get("subset") or known.against.where.get("questions") or "all"
            if experiment != self.config.experiment.name or part not in numbers.get(name, {}):
                continue
            number = numbers[name][part]
            comparable = not self.config.departures and number.get("n") == known.n
            interval = number.get("interval")
            rows.append({
                "id": known.id, "value": known.value, "evidence": known.evidence, "measured": number["value"],
                "interval": interval, "verdict": verdict_of_value(known.value, interval if comparable else None).value,
            })  # fmt: skip
        return rows

    def facts(self) -> dict[str, Any]:
        """What a table shows beside a value: run, experiment, scale, hardware and date."""
        config, machine = self.config, self.environment
        gpus = Counter(machine["gpus"] if config.scale.device != "cpu" else [])
        hardware = (
            ", ".join(f"{n} x {name}" for name, n in gpus.items()) or f"{machine['cores']} cores, {machine['cpu']}"
        )
        nodes = f"{config.scale.parallel.nodes} nodes of " if config.scale.parallel.nodes > 1 else ""
        values = machine["run"], config.experiment.name, config.scale.name, nodes + hardware, machine["date"][:10]
        return dict(zip(FACTS, values, strict=True))


def pack(record: RunRecord, out: Path) -> dict[str, Any]:
    """Write the bundle of a finished run to a new folder or, if the name ends in `.zip`, file.

    Returns:
        `check`'s dict with `bundle` and `files` (their number).

    Raises:
        CompanionError: no finished run, weights other than the manifest's, questions missing, or too large.
    """
    if not (record.path / "config.yaml").is_file():
        raise DataError(f"{display_path(record.path)}: no record of a run; fix: give runs/EXPERIMENT/SCALE/ID")
    if out.exists():
        raise DataError(f"{display_path(out)}: exists already; fix: choose another place, or remove it first")
    record.summary  # noqa: B018 - a DataError if the run has not finished
    manifest, folder = record.path / MANIFEST, record.config.data_path
    for name, digest in read_json(manifest)["files"].items():
        weights = contained_file(record.checkpoint, name)
        if sha256_file(weights) != digest:
            raise DataError(f"{display_path(weights)}: SHA-256 is not the manifest's; fix: train again")
    sources = {path.name: path for path in sorted(record.path.iterdir()) if path.suffix in (".json", ".jsonl", ".yaml")}
    sources[MANIFEST] = manifest
    cards = [folder / name for name in ("card.json", CARD, TWIN)]
    sources |= {f"data/{path.name}": path for path in cards if path.is_file()}
    with tempfile.TemporaryDirectory() as temporary:
        bundle = Bundle(Path(temporary))
        (bundle.path / "data").mkdir()
        bundle.checkpoint.mkdir()
        for name, source in sources.items():
            shutil.copyfile(source, bundle.path / name)
        if any("subsets" in result for result in bundle.results.values()):
            asked = as_questions(load_problems(folder, "test", check_images=False))
            write_json(bundle.path / QUESTIONS, [asdict(question) for question in asked])
        answers = {*bundle.results, *(f"{name}_answers" for name in bundle.results)}
        files = sorted(path for path in bundle.path.rglob("*") if path.is_file())
        sizes = [(path.stat().st_size, path.name) for path in files if path.stem not in answers]
        if (total := sum(size for size, _ in sizes)) > MAX_BYTES:
            raise DataError(
                f"{display_path(record.path)}: {total / 1e6:.0f} MB without answers, at most {MAX_BYTES / 1e6:.0f} are "
                f"packed; fix: move {max(sizes)[1]} out of the record"
            )
        digests = {path.relative_to(bundle.path).as_posix(): sha256_file(path) for path in files}
        index = {"format_version": FORMAT_VERSION, **bundle.facts(), "files": digests, "claims": bundle.claims()}
        write_json(bundle.path / INDEX, index)
        _write(bundle.path, [*digests, INDEX], out)
    return {"bundle": display_path(out), "files": len(digests) + 1, **check(out)}


def _write(folder: Path, names: list[str], out: Path) -> None:
    if out.suffix != ".zip":
        with atomic_folder(out) as target:
            for name in names:
                (target / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(folder / name, target / name)
        return
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
        for name in names:  # a ZipInfo of its own has no date of today: equal bundles have equal bytes
            file.writestr(zipfile.ZipInfo(name), (folder / name).read_bytes(), zipfile.ZIP_DEFLATED)
    atomic_write(out, packed.getvalue())


@contextlib.contextmanager
def _unpacked(path: Path) -> Iterator[Path]:
    """The folder of a bundle; a ZIP file is unpacked into a temporary one. Links and paths out of it are refused."""
    if path.is_dir():
        for entry in path.rglob("*"):
            if entry.is_symlink() or not (entry.is_dir() or entry.is_file()):
                raise DataError(f"{display_path(entry)}: a link or no regular file; refused; fix: put the file there")
        yield path
        return
    with tempfile.TemporaryDirectory() as temporary:
        try:
            with zipfile.ZipFile(path) as file:
                _refuse_links(path, file.infolist())
                file.extractall(temporary)
        except (OSError, zipfile.BadZipFile, RuntimeError) as error:
            message = f"{display_path(path)}: no bundle ({error}); fix: give what `llava evidence pack` wrote"
            raise DataError(message) from error
        yield Path(temporary)


def _refuse_links(path: Path, entries: list[zipfile.ZipInfo]) -> None:
    for entry in entries:
        place, kind = PurePosixPath(entry.filename), stat.S_IFMT(entry.external_attr >> 16)
        outside = place.is_absolute() or ".." in place.parts or {"\\", ":", "\0"} & {*entry.filename}
        if outside or kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise DataError(f"{display_path(path)}: '{entry.filename}' is a link or leads out of it; refused")
    if sum(entry.file_size for entry in entries) > MAX_UNPACKED:
        raise DataError(f"{display_path(path)}: more than {MAX_UNPACKED / 1e9:.0f} GB unpacked; refused")


def check(path: Path) -> dict[str, Any]:
    """Check a bundle, without network and weights.

    Returns:
        `Bundle.facts`; claims (`Bundle.claims`; none if their check fails); checks ({name, ok, message}).

    Raises:
        DataError: not a bundle, of another format version, or with links or paths out of it.
    """
    with _unpacked(path) as folder:
        index, bundle = read_json(folder / INDEX), Bundle(folder)
        version = index.get("format_version") if isinstance(index, dict) else None
        if version != FORMAT_VERSION:
            raise DataError(f"{display_path(path)}: format version {version}, this code reads {FORMAT_VERSION}")

        checks = []
        for name, work in CHECKS.items():
            row = {"name": name, "ok": False}
            try:
                row |= {"message": work(bundle), "ok": True}
            except CompanionError as error:
                row["message"] = str(error).replace(f"{display_path(folder)}/", "")
            except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
                row["message"] = f"a value is missing or of the wrong type ({error!r}); fix: pack the record again"
            checks.append(row)
        facts = {key: index.get(key) for key in FACTS}
        return {**facts, "claims": index["claims"] if checks[-1]["ok"] else [], "checks": checks}


def failures(result: Mapping[str, Any]) -> list[str]:
    """The names of the checks that failed."""
    return [row["name"] for row in result["checks"] if not row["ok"]]


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise DataError(message)


def _compare(where: str, stored: Any, expected: Any, key: str = "") -> None:
    """Raise DataError at the first value of `expected` that `stored` does not have."""
    if isinstance(expected, Mapping) and isinstance(stored, Mapping):
        for name, value in expected.items():
            _compare(where, stored.get(name), value, f"{key}.{name}" if key else str(name))
        return
    numbers = all(isinstance(value, int | float) for value in (stored, expected))
    equal = math.isclose(stored, expected, rel_tol=1e-9) if numbers else stored == expected
    if isinstance(expected, list) and isinstance(stored, list) and len(stored) == len(expected):
        for k, value in enumerate(expected):
            _compare(where, stored[k], value, f"{key}[{k}]")
        return
    _require(equal, f"{where}: {key} is {stored!r}, expected {expected!r}")


def _files(bundle: Bundle) -> str:
    listed = bundle.index["files"]
    found = {p.relative_to(bundle.path).as_posix() for p in bundle.path.rglob("*") if p.is_file()} - {INDEX}
    for name in sorted({*REQUIRED, *listed, *found}):
        _require(name in found, f"{name}: missing")
        _require(name in listed, f"{name}: {INDEX} does not list it")
        digest = sha256_file(bundle.path / name)
        _require(digest == listed[name], f"{name}: SHA-256 is {digest}, expected {listed[name]}")
    return f"{len(listed)} files have their SHA-256"


def _run(bundle: Bundle) -> str:
    machine, model = bundle.environment, bundle.config.experiment.model
    run = fingerprint({"config": bundle.config.run_id, "inputs": machine["inputs"]})
    named = {
        "environment.json": machine["run"],
        "summary.json": bundle.summary["run"],
        MANIFEST: bundle.manifest["run_id"],
    }
    for name, own in named.items():
        _require(own == run, f"{name}: the run is {own}, expected {run} of config.yaml and environment.json's inputs")
    for part, base in {"language_model": model.language_model, "vision_tower": model.vision_tower}.items():
        _compare(MANIFEST, bundle.manifest["base_hash"][part], machine["inputs"]["base"][base], f"base_hash.{part}")
    _require(bool(bundle.manifest["files"]), f"{MANIFEST}: no SHA-256 of weights")
    n = len(bundle.config.experiment.data.files)
    _require(len(machine["inputs"]["data"]) == n, f"environment.json: no SHA-256 of all {n} data files")
    _compare(INDEX, bundle.index, bundle.facts())
    return f"config.yaml and the inputs give the run {run}"


def _departures(bundle: Bundle) -> str:
    here, paper = bundle.config.experiment, published_experiment(bundle.config.experiment.name)
    expected: dict[str, Any] = {}
    for field in (name for name in field_names(ExperimentConfig) if name not in META):
        values = [to_jsonable_python(value_of(experiment, field)) for experiment in (paper, here)]
        if values[0] != values[1]:
            expected[field] = values
    stand_ins = load_scale(bundle.config.scale.name, bundle.config.scale_overrides).stand_ins
    places = {here.data.name, f"{here.data.name}_images", *bundle.config.base_models}
    listed = {d.field: to_jsonable_python([d.paper, d.here]) for d in bundle.config.departures}
    expected |= {f"scale.{part}": listed.get(f"scale.{part}") for part in stand_ins.keys() & places}
    for field in sorted(expected.keys() | listed.keys()):
        _require(field in listed, f"config.yaml: departures leave out {field}")
        _require(field in expected, f"config.yaml: departures list {field}, which is the paper's")
        _compare("config.yaml", listed[field], expected[field], f"departures, {field} ([paper, here])")
    return f"{len(listed)} departures from the paper, all listed"


def _metrics(bundle: Bundle) -> str:
    for k, row in enumerate(bundle.metrics(), start=1):
        bad = next((name for name, v in row.items() if isinstance(v, float) and not math.isfinite(v)), None)
        _require(bad is None, f"metrics.jsonl, row {k} (step {row['step']}): {bad} is not finite")
        _compare(f"metrics.jsonl, row {k}", bundle.summary, {n: row[n] for n in ("samples", "steps") if n in row})
    for expected, row in enumerate(bundle.rows, start=1):
        _require(row["step"] == expected, f"metrics.jsonl: a row of step {row['step']}, expected step {expected}")
    _require(len(bundle.rows) == bundle.steps, f"metrics.jsonl: {len(bundle.rows)} steps, expected {bundle.steps}")
    return f"steps 1 to {bundle.steps}, each once"


def _learning_rate(bundle: Bundle) -> str:
    from llava_core.train.optimizer import learning_rate  # imports torch

    for row in bundle.rows:
        expected = learning_rate(row["step"] - 1, bundle.steps, bundle.config.experiment.train)
        _compare(f"metrics.jsonl, step {row['step']}", row["lr"], expected, "lr")
    return "every row has the schedule's learning rate"


def _summary(bundle: Bundle) -> str:
    last = bundle.rows[-1]
    expected = {"steps": bundle.steps, "final_loss": final_loss(bundle.rows), "heldout_loss": last.get("heldout_loss")}
    expected |= {name: last[name] for name in ("seconds", "samples_per_s", "tokens_per_s")}
    _compare("summary.json", bundle.summary, expected)
    return f"final loss {expected['final_loss']:.4f} and held-out loss are those of the rows"


def _throughput(bundle: Bundle) -> str:
    samples, train, parallel = bundle.summary["samples"], bundle.config.experiment.train, bundle.config.scale.parallel
    processes = len(bundle.environment["gpus"]) if parallel.processes == "gpus" else parallel.processes
    # rank 0's samples times the ranks: too many where the last batch of an epoch does not divide
    slack = (processes * parallel.nodes - 1) * train.epochs

    def seen(step: int) -> int:
        epochs, k = divmod(step, bundle.steps_per_epoch)
        return int(epochs * samples + min(k * train.global_batch, samples))

    def right(row: Mapping[str, Any], start: int, began: float) -> bool:
        counted, expected = row["samples_per_s"] * (row["seconds"] - began), seen(row["step"]) - seen(start)
        return math.isclose(counted, expected, rel_tol=1e-6, abs_tol=slack)

    # rates count from the start of a process: step 0, or the step before its first row after a resume
    start, began, tokens, last = 0, 0.0, 0.0, 0.0
    for row in bundle.rows:
        step, seconds, where = row["step"], row["seconds"], f"metrics.jsonl, step {row['step']}"
        _require(seconds > last, f"{where}: seconds is {seconds}, expected more than {last}")
        if not right(row, start, began):
            start, began, tokens = step - 1, last, 0.0
        expected = (seen(step) - seen(start)) / (seconds - began)
        _require(right(row, start, began), f"{where}: samples_per_s is {row['samples_per_s']:g}, expected {expected:g}")
        counted = row["tokens_per_s"] * (seconds - began)
        whole = counted > tokens and abs(counted - round(counted)) < 1e-3
        _require(whole, f"{where}: tokens_per_s x seconds is {counted:g}, expected a whole number above {tokens:g}")
        tokens, last = counted, seconds
    return f"{seen(bundle.steps)} samples and their tokens in {last:.0f} s"


def _scores(bundle: Bundle) -> str:
    for name, stored in bundle.results.items():
        _check_accuracies(f"{name}.json", stored)
        if "subsets" in stored:
            _science_qa(bundle, name, stored)
        if "reviews" in stored:
            for review in stored["reviews"]:
                answer = stored["answers"][str(review["question_id"])]
                where = f"{name}.json, review of question {review['question_id']}"
                _compare(where, review["answer2_id"], fingerprint(answer), "answer2_id")
            _compare(f"{name}.json", stored, score_reviews(stored["reviews"]))
    return f"recomputed: {', '.join(bundle.results) or 'no evaluation is stored'}"


def _check_accuracies(where: str, part: Any, key: str = "") -> None:
    if isinstance(part, Mapping):
        if part.get("n") and {"correct", "accuracy"} <= part.keys():
            _compare(where, part["accuracy"], 100 * part["correct"] / part["n"], f"{key}accuracy")
        for name, inner in part.items():
            _check_accuracies(where, inner, f"{key}{name}.")


def _science_qa(bundle: Bundle, name: str, stored: Mapping[str, Any]) -> None:
    file = f"{name}_answers.jsonl"
    model = {"run_id": bundle.environment["run"], "checkpoint": f"manifest:{fingerprint(bundle.manifest)}"}
    texts: dict[str, str] = {}
    for line, row in enumerate(read_jsonl(bundle.path / file), start=1):
        where = f"{file}, line {line} (question {row['question_id']})"
        _compare(where, row["metadata"], model, "metadata")
        given = [row["question_id"], row["prompt"], row["text"], row["metadata"]]
        _compare(where, row["answer_id"], fingerprint(given), "answer_id (of prompt, text and settings)")
        _compare(f"{name}.json", stored["answers"].get(str(row["question_id"])), row["text"], f"answers.{given[0]}")
        texts[str(row["question_id"])] = row["text"]
    _require(len(texts) == len(stored["answers"]), f"{file}: {len(texts)} answers, expected {len(stored['answers'])}")
    questions = read_json(bundle.path / QUESTIONS)
    if (local := bundle.config.data_path / "problems.json").is_file():
        known = {q.id: asdict(q) for q in as_questions(load_problems(local.parent, "test", check_images=False))}
        for question in questions:
            _compare(f"{QUESTIONS} against {display_path(local)}", question, known.get(question["id"]), question["id"])
    asked = [Question(**question) for question in questions[: stored["n"]]]
    expected = score(asked, texts, era=stored["era"])
    _compare(f"{name}.json", stored, {key: value for key, value in expected.items() if key != "notes"})


def _claims(bundle: Bundle) -> str:
    claims = bundle.claims()
    stored = {row["id"]: row for row in bundle.index["claims"]}
    for row in claims:
        _compare(INDEX, stored.pop(row["id"], None), row, row["id"])
    _require(not stored, f"{INDEX}: the run does not measure the claims {', '.join(stored)}")
    return f"{len(claims)} claim{'s' * (len(claims) != 1)} of the paper measured"


_CHECKS = (_files, _run, _departures, _metrics, _learning_rate, _summary, _throughput, _scores, _claims)
CHECKS = {work.__name__.strip("_").replace("_", " "): work for work in _CHECKS}


def bundles(folder: Path) -> dict[str, dict[str, Any]]:
    """The results of `check` for the bundles of a folder, by name; a file that is no bundle fails the check `open`."""
    results = {}
    for path in (p for p in sorted(folder.glob("*")) if p.suffix == ".zip" or (p / INDEX).is_file()):
        try:
            results[path.name] = check(path)
        except CompanionError as error:
            checks = [{"name": "open", "ok": False, "message": str(error)}]
            results[path.name] = {**dict.fromkeys(FACTS), "claims": [], "checks": checks}
    return results
