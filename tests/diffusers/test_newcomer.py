"""What somebody meets first: the example, the schema, options of models, versions, and errors in one line."""

import dataclasses
import json
import logging
import os
import subprocess
import sys

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from PIL import Image
from safetensors import SafetensorError

import keylock_diffusers as kd
import keylock_kernels
from keylock_diffusers import cli, embedded
from keylock_diffusers.cli import common
from keylock_diffusers.demo import pictures, regions, story
from keylock_diffusers.requests import LISTS, Request, Use
from keylock_diffusers.requests_schema import schema
from tests.diffusers.test_cli import ROOT, fail, run

KINDS = {kind.__name__: kind for kind in (Request, *LISTS.values(), kd.Attention)}
TYPES = {"string": str, "integer": int, "number": (int, float), "null": type(None), "object": dict, "array": list}


def fits(value, said, whole):
    """Whether a value is what JSON Schema says, as far as ours says anything."""
    if "$ref" in said:
        return fits(value, whole["$defs"][said["$ref"].rpartition("/")[2]], whole)
    if "anyOf" in said:
        return any(fits(value, one, whole) for one in said["anyOf"])
    if "enum" in said:
        return value in said["enum"]
    kinds = said["type"] if isinstance(said["type"], list) else [said["type"]]
    if isinstance(value, bool) or not any(isinstance(value, TYPES[kind]) for kind in kinds):
        return False
    if isinstance(value, list):
        right = said.get("minItems", 0) <= len(value) <= said.get("maxItems", len(value))
        return right and all(fits(item, said["items"], whole) for item in value)
    if isinstance(value, dict) and "properties" in said:
        known = all(name in said["properties"] for name in value) and all(name in value for name in said["required"])
        return known and all(fits(item, said["properties"][name], whole) for name, item in value.items())
    return True


def test_the_schema_is_that_of_the_fields_that_json_may_name():
    said = json.loads(run("schema"))
    assert said == schema() and {*said["$defs"]} == {*KINDS, "Picture"}
    for name, kind in KINDS.items():
        own = said["$defs"][name]
        fields = {field.name: field for field in dataclasses.fields(kind)}
        for field in fields:
            holds = {"prompt": "a"} if kind is Request else {}
            given = holds | {field: None}
            if kind is Request:
                refused = refusal(given)
            elif kind is kd.Attention:
                refused = refusal({"prompt": "a", "loras": [{"lora": "alice/style", "region": given}]})
            else:
                (place,) = [place for place, inner in LISTS.items() if inner is kind][:1]
                refused = refusal({"prompt": "a", place: [given]})
            assert ("is no field" in refused) == (field not in own["properties"]), field
        assert {*own["properties"]} <= {*fields} and own["additionalProperties"] is False
        assert all(one["description"] for one in own["properties"].values())
        for field, one in own["properties"].items():
            assert "default" not in one or fits(one["default"], one, said), field


def refusal(order):
    try:
        Request.from_json(order, ROOT)
    except (TypeError, ValueError, OSError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("order", "right"),
    [
        ({}, False),
        ({"prompt": "a"}, True),
        ({"prompt": "a", "seed": None, "original_size": [8, 8]}, True),
        ({"prompt": "a", "concepts": ["alice/cat", {"concept": "bob/cat", "lock": "global"}]}, True),
        ({"prompt": "a", "image_prompts": [{"image": ["a.png", "b.png"], "scale": {"down": 1.0}}]}, True),
        ({"prompt": "a", "regions": [{"mask": "a.png", "tokens": [1, 2]}]}, True),
        ({"prompt": "a", "embeddings": [{"source": "a.safetensors"}, {"source": "b", "name": "<b>"}]}, True),
        ({"prompt": "a", "embeddings": [{"name": "<b>"}]}, False),
        ({"prompt": "a", "loras": [{"lora": "a/b", "region": {"word": "cat", "threshold": 0.5}}]}, True),
        ({"prompt": "a", "loras": [{"lora": "a/b", "region": {"threshold": 0.5}}]}, False),
        ({"prompt": "a", "image_prompts": [{"image": "a.png", "region": {"word": "cat"}}]}, False),
        ({"prompt": "a", "embeddings": ["a.safetensors"]}, False),
        ({"prompt": "a", "latents": [1.0]}, False),
        ({"prompt": 7}, False),
        ({"prompt": "a", "original_size": [8]}, False),
        ({"prompt": "a", "endings": "all"}, False),
        ({"prompt": "a", "concepts": "alice/cat"}, False),
        ({"prompt": "a", "concepts": [{"beta": 0.5}]}, False),
        ({"prompt": "a", "controls": [{"name": "edges"}]}, False),
    ],
)
def test_the_schema_tells_orders_from_what_is_none(order, right):
    assert fits([order], schema(), schema()) == right


def test_the_example_is_read_drawn_and_valid(tmp_path, monkeypatch, pipe, concept_for):
    monkeypatch.chdir(tmp_path)
    said = run("example", "a folder")
    orders = json.loads((tmp_path / "a folder" / "requests.json").read_text())
    assert fits(orders, schema(), schema())
    requests = [Request.from_json(order, tmp_path / "a folder") for order in orders]
    held = {name for order in orders for name in order}
    # All of a request but what needs models that the package does not ship, SDXL's own, and endings.
    assert held >= {"id", "prompt", "negative_prompt", "concepts", "image_prompts", "regions", "image", "mask"}
    assert held >= {"strength", "guidance_scale", "seed", "num_images"}
    of_key_locked = {"beta", "tau", "lock"}
    assert {name for order in orders for use in order.get("concepts", []) if isinstance(use, dict) for name in use} == {
        field.name for field in dataclasses.fields(Use)
    } - of_key_locked
    model = kd.install(embedded.load_adapter(embedded.load()))
    images = kd.generate(model, requests, bank={"alice/cat": concept_for(model)}, num_inference_steps=2)
    assert [len(image) if isinstance(image, list) else image.size for image in images] == [(128, 128), 2] + 5 * [
        (128, 128)
    ]
    folder = tmp_path / "a folder" / "alice"
    for n in range(4):
        assert pictures.USERS[0].placeholder in (folder / f"{n}.txt").read_text()
        assert Image.open(folder / f"{n}.png").size == Image.open(folder / f"{n}-mask.png").size == (128, 128)
    assert "keylock train 'a folder/alice'" in said and "keylock generate 'a folder/requests.json'" in said


def test_the_example_replaces_nothing(tmp_path, monkeypatch, capsys):
    (tmp_path / "requests.json").write_text("mine")
    error = fail(capsys, monkeypatch, "example", tmp_path)
    assert f"{tmp_path / 'requests.json'} exists already" in error
    assert [p.name for p in tmp_path.iterdir()] == ["requests.json"]
    assert (tmp_path / "requests.json").read_text() == "mine"


def test_the_version_is_one():
    assert kd.__version__ == keylock_kernels.__version__
    assert run("--version").strip() == f"keylock {kd.__version__}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "--dtype must be float32, float16 or bfloat16, got 'int8'"),
        ({"device": "gpu"}, "--device: torch cannot use 'gpu' here"),
        ({"device": "cuda:7"}, "--device: torch cannot use 'cuda:7' here"),
        ({"scheduler": "EulerDiscret"}, "--scheduler must be .* close to it: .*EulerDiscreteScheduler"),
        ({"scheduler": "UNet2DConditionModel"}, "--scheduler must be the name of a scheduler"),
        ({"model": "nowhere"}, "--model must be a folder with a diffusers pipeline"),
        ({"model": "/nowhere/at/all"}, "--model must be a folder with a diffusers pipeline"),
        ({"model": "."}, "--model must be a folder with a diffusers pipeline"),
    ],
)
def test_a_model_that_cannot_be_had_is_named_by_its_option(monkeypatch, tmp_path, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        common.load(**{"model": "embedded", **options})


def test_a_folder_that_is_a_damaged_model_is_named(tmp_path):
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match=r"--model: .* cannot be loaded"):
        common.load(str(tmp_path))


def test_models_of_ones_own_are_loaded_as_asked_for():
    pipe = common.load(str(embedded.BASE_MODEL), dtype="bfloat16", device="cpu", scheduler="EulerDiscreteScheduler")
    assert pipe.unet.dtype == torch.bfloat16 and type(pipe.scheduler) is EulerDiscreteScheduler
    assert pipe.scheduler.config.prediction_type == embedded.load().scheduler.config.prediction_type
    assert type(common.load("embedded").scheduler) is DDIMScheduler


@pytest.mark.parametrize("command", ["generate", "sweep"])
def test_the_options_of_a_model_reach_it(monkeypatch, tmp_path, capsys, command):
    """What the command line says of the model is what is loaded, and its size what is drawn."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "orders.json").write_text('[{"prompt": "a cat", "seed": 1}]')
    seen = {}

    def load(model, **options):
        seen.update(model=model, **options)
        raise ValueError("seen")

    monkeypatch.setattr(common, "load", load)
    what = ("orders.json",) if command == "generate" else ("a cat", "--concept", "a", "--beta", "1,2")
    options = {
        "model": "owner/name",
        "dtype": "float16",
        "device": "cpu",
        "variant": "fp16",
        "scheduler": "DDIMScheduler",
    }
    given = [part for name, value in options.items() for part in (f"--{name}", value)]
    assert "seen" in fail(capsys, monkeypatch, command, *what, *given)
    assert seen == options


def test_the_size_is_what_is_drawn(monkeypatch, tmp_path, pipe):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "load", lambda model, **options: pipe)
    (tmp_path / "orders.json").write_text('[{"prompt": "a cat", "seed": 1}]')
    run("generate", "orders.json", "--steps", 1, "--height", 24, "--width", 32)
    assert Image.open("outputs/000.png").size == (32, 24)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (SafetensorError("header too large"), "keylock: SafetensorError: header too large (KEYLOCK_TRACEBACK=1"),
        (ImportError("Install s3fs to access S3"), "keylock: ImportError: Install s3fs to access S3 (KEYLOCK"),
        (MemoryError(), "keylock: MemoryError:"),
        (AssertionError("Torch not compiled with CUDA enabled"), "keylock: AssertionError: Torch not"),
        (ValueError("two\nlines of it"), "keylock: two lines of it"),
        (ValueError("long " * 10_000), "keylock: long long"),
        (KeyError("no concept 'x'"), "keylock: no concept 'x'"),
        (OSError(28, "No space left on device", "x.png"), "keylock: [Errno 28] No space left on device: 'x.png'"),
        (RecursionError("maximum recursion depth exceeded"), "keylock: RecursionError: maximum"),
    ],
)
def test_whatever_goes_wrong_is_one_line(monkeypatch, capsys, error, line):
    def wrong():
        raise error

    monkeypatch.setattr(cli, "app", wrong)
    monkeypatch.delenv("KEYLOCK_TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    said = capsys.readouterr().err
    assert stopped.value.code == 1 and said.startswith(line) and len(said.splitlines()) == 1 and len(said) < 500
    monkeypatch.setenv("KEYLOCK_TRACEBACK", "1")
    with pytest.raises(type(error)):
        cli.main()


def test_the_first_run_shows_no_notes_of_other_libraries(tmp_path):
    """A process of its own, since notes come with imports."""
    (tmp_path / "orders.json").write_text('[{"prompt": "a cat", "seed": 1, "image_prompts": [{"image": "p.png"}]}]')
    Image.new("RGB", (64, 64), "red").save(tmp_path / "p.png")
    environ = {name: value for name, value in os.environ.items() if not name.endswith("_VERBOSITY")}
    environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'python'}"
    command = [sys.executable, "-m", "keylock_diffusers.cli", "generate", "orders.json", "--steps", "1"]
    done = subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["outputs/000.png"]
    assert [
        line
        for line in done.stderr.replace("\r", "\n").splitlines()
        if line.strip() and "it/s]" not in line and "?it/s" not in line
    ] == []


def test_the_embedded_model_says_nothing_of_its_autoencoder(caplog):
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    try:
        before = logger.level
        embedded.load_adapter(embedded.load())
        assert not caplog.records and logger.level == before
    finally:
        logger.removeHandler(caplog.handler)


def test_help_costs_no_import_of_torch():
    code = "import sys, keylock_diffusers.cli; sys.exit(any(n in sys.modules for n in ('torch', 'diffusers', 'PIL')))"
    environ = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'python'}"}
    assert subprocess.run([sys.executable, "-c", code], env=environ).returncode == 0


def test_a_negative_seed_is_refused_before_the_demo(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(story, "run", lambda *a, **k: pytest.fail("the demo began"))
    assert "seed" in fail(capsys, monkeypatch, "demo", "--seed", "-5")


def test_concepts_that_are_still_one_and_the_same_leave_their_line_out(tmp_path, concept_for):
    model = kd.install(embedded.load_adapter(embedded.load()))
    same = concept_for(model)
    bank = {f"{user.name.lower()}/cat": same.with_(placeholder=user.placeholder) for user in pictures.USERS}
    report = regions.run(model, bank, tmp_path, steps=1, seed=0)
    assert report["pictures_in_batch"] == 4 and report["left_out"] == ["two subjects, each in its own half"]
    assert Image.open(tmp_path / "regions.png").height == 4 * 190


def test_the_demo_looks_at_its_output_before_the_work(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(story, "run", lambda *_, **__: pytest.fail("it began"))
    (tmp_path / "file").write_text("")
    assert "--output must be a place" in fail(capsys, monkeypatch, "demo", "--output", tmp_path / "file")
