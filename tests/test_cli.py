"""The command line: recipes merged and shown, mistakes refused by name, nothing but words where people read."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from diffusion.presets import PRESETS
from diffusion.recipe import digest_of
from flows import console
from flows.cli import app
from flows.recipes import allowed, as_toml, keys, merged

CODEC = ("--set", "train.codec=autoencoder-kl", "--set", "train.codec_channels=4")
COMMANDS = ("shard", "train", "sweep", "evaluate", "register", "deploy", "run", "sample")


def diffusion(*arguments: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, arguments)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout, done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    code, out, _ = diffusion(command, "--help")
    assert code == 0
    assert "--home" in out
    assert command == "sample" or ("--preset" in out and "--set" in out)


def test_a_program_that_starts_waits_for_no_library_that_it_may_not_need() -> None:
    started = subprocess.run(
        [sys.executable, "-c", "import sys, flows.cli; print(*sys.modules)"], capture_output=True, text=True, check=True
    )
    assert {"torch", "ray", "mlflow", "prefect"} & set(started.stdout.split()) == set()


@pytest.mark.parametrize("preset", PRESETS)
def test_a_shown_recipe_reads_back(preset: str, tmp_path: Path) -> None:
    code, out, _ = diffusion("recipe", "show", "--preset", preset, "--describe")
    assert code == 0
    assert out.splitlines()[0] == f"# digest {digest_of(PRESETS[preset]())}"
    (tmp_path / "recipe.toml").write_text(out)
    other = next(name for name in PRESETS if name != preset)
    assert merged(other, file=tmp_path / "recipe.toml") == PRESETS[preset]()


def test_every_key_can_be_set_to_its_own_value() -> None:
    recipe = PRESETS["smoke"]()
    for key, field in keys():
        value: object = recipe
        for part in key.split("."):
            value = getattr(value, part)
        text = value if isinstance(value, str) else "none" if value is None else json.dumps(value)
        assert merged("smoke", settings=[f"{key}={text}"]) == recipe, key
        assert allowed(field)


@pytest.mark.parametrize(
    ("setting", "path", "value"),
    [
        ("train.images=1000", ("train", "images"), 1000),
        ("evaluate.loss_levels=1,2.5", ("evaluate", "loss_levels"), (1.0, 2.5)),
        ("evaluate.loss_levels=[1, 2.5]", ("evaluate", "loss_levels"), (1.0, 2.5)),
        ("train.degradations=colorization, inpainting", ("train", "degradations"), ("colorization", "inpainting")),
        ('train.degradations=["colorization"]', ("train", "degradations"), ("colorization",)),
        ("train.degradations=", ("train", "degradations"), ()),
        ("train.hflip=true", ("train", "hflip"), True),
        ("train.lr=3e-4", ("train", "lr"), 3e-4),
        ("train.decay=none", ("train", "decay"), "none"),
        ("gate.max_frechet=12.5", ("gate", "max_frechet"), 12.5),
        ("gate.max_frechet=none", ("gate", "max_frechet"), None),
        ("evaluate.guide_images=10016", ("evaluate", "guide_images"), 10_016),
        ("evaluate.guide_images=none", ("evaluate", "guide_images"), None),
        ("name=1984", ("name",), "1984"),
    ],
)
def test_values_are_typed(setting: str, path: tuple[str, ...], value: object) -> None:
    found: object = merged("demo", settings=[setting])
    for part in path:
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("train.imagse=3", "did you mean train.images?"),
        ("images=3", "train.images"),
        ("train.unet=3", "train.unet.channels, train.unet.multipliers"),
        (
            "train.images=0",
            "train.images=0: it must be at least 1. Allowed: whole number, at least 1",
        ),
        ("train.images=many", "train.images=many: it is no whole number. Allowed: whole number, at least 1"),
        (
            "train.decay=step",
            "train.decay=step: it must be 'cosine', 'inverse_sqrt' or 'none'. Allowed: cosine | inverse_sqrt | none",
        ),
        ("evaluate.sampling.sampler=euler", "heun | ddim | dpmpp_2m | unipc"),
        ("shard.background=white", "shard.background=white"),
        ("train.ema=0.5", "train.ema=(0.5,): relative widths"),
        ("train.unet.blocks=1", "train.unet.blocks=(1,) and multipliers"),
        ("evaluate.ema=0.3", "evaluate.ema=0.3: it must be below 0.28"),
        ("evaluate.guide_images=5", "evaluate.guide_images=5: the run has checkpoints at 10016, 20000"),
        ("shard.resolution=100", "multiple of 8"),
        ("train.lr=NaN", "train.lr=NaN"),
        ("evaluate.loss_levels=[nan]", "evaluate.loss_levels=[nan]: it is no finite number. Allowed: list of"),
        ("evaluate.loss_levels=[NaN]", "evaluate.loss_levels=[NaN]: it is no finite number. Allowed: list of"),
        ("evaluate.loss_levels=1,inf", "evaluate.loss_levels=1,inf: it is no finite number"),
        ("evaluate.loss_levels=1,x", "evaluate.loss_levels=1,x: it is no number"),
        ("sweep.steps=a,b", "sweep.steps=a,b: it is no whole number"),
        ("evaluate.loss_levels=[]", "evaluate.loss_levels=[]: it must have at least 1 items. Allowed"),
        ("evaluate.bound_steps=1", "evaluate.bound_steps=1: a chain has at least 2 steps; 0 measures no bound"),
        ("evaluate.bound_sigma_min=90", "bound_sigma_min=90.0 must be below bound_sigma_max=80.0"),
        ("train.images", "--set key=value"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(setting: str, says: str) -> None:
    code, out, err = diffusion("recipe", "show", "--set", setting)
    assert code == 2
    assert out == ""
    assert says in err
    assert len(err.splitlines()) == 1
    assert "Traceback" not in err


def test_no_wrong_value_of_any_key_is_refused_in_the_words_of_a_library() -> None:
    told = []
    for key, _ in keys():
        for value in ("none", "x", "-1", "0.3", "[]", "[-1]", '["x"]', "1e999", "10000000"):
            try:
                merged("smoke", settings=[f"{key}={value}"])
            except ValueError as error:
                told.append(str(error))
    assert len(told) > 300
    assert [text for text in told if re.search(r"Input|should|\btuple|valid|pydantic", text)] == []


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"[train]\nimage = 3", "did you mean train.images"),
        (b"train = ", "no TOML"),
        (b'name = "\xff"', "no TOML"),
        (b"[train]\nimages = 0", "in "),
    ],
)
def test_a_wrong_recipe_file_is_refused_by_name(content: bytes, says: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_bytes(content)
    code, _, err = diffusion("recipe", "show", "--recipe", str(file))
    assert code == 2
    assert says in err


def test_an_unknown_preset_names_the_presets() -> None:
    code, _, err = diffusion("run", "--preset", "dmeo")
    assert code == 2
    assert all(name in err for name in PRESETS)


def test_the_digest_is_the_recipes_alone() -> None:
    shown = as_toml(merged("demo", settings=["train.images=128"]))
    assert shown.splitlines()[0] == f"# digest {digest_of(merged('demo', settings=['train.images=128']))}"
    assert tomllib.loads(shown)["train"]["images"] == 128


@pytest.mark.parametrize("command", ["shard", "train", "evaluate", "register", "run"])
def test_an_empty_source_is_no_source(command: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, [command, "--source", "", "--home", str(tmp_path / "home")])
    assert done.exit_code == 2
    assert "it is empty" in done.output
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (("run", "--source", "{}/none"), "{}/none"),
        (("shard", "--source", "{}/none"), "{}/none"),
        (
            ("shard", "--dry-run", *CODEC, "--set", "train.codec_factor=8", "--set", "train.unet.attention=[]"),
            "set DIFFUSION_CODEC_AUTOENCODER_KL to a folder",
        ),
        (
            ("train", *CODEC, "--set", "train.codec_factor=8", "--set", "train.unet.attention=[]"),
            "set DIFFUSION_CODEC_AUTOENCODER_KL to a folder",
        ),
        (("train",), "run `diffusion shard` with the same options"),
        (("evaluate", "--dataset", "latest"), "no dataset"),
        (("evaluate", "--set", "evaluate.extractor=dinov2"), "set DIFFUSION_EXTRACTOR_DINOV2 to"),
        (("sample", "--bundle", "{}/none"), "{}/none is no bundle"),
        (("sample", "--bundle", "{}/none", "--sampler", "euler"), "sampler='euler'"),
        (("sample", "--bundle", "{}/none", "--out", "/dev/null"), "/dev/null cannot be written"),
    ],
)
def test_what_is_missing_or_wrong_is_told_at_once(command: tuple[str, ...], says: str, tmp_path: Path) -> None:
    command = tuple(part.format(tmp_path) for part in (*command, "--home", "{}/home"))
    done = subprocess.run(
        [sys.executable, "-c", "from flows.cli import main; main()", *command],
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"DIFFUSION_GPU": "false"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 2
    assert _told(done.stderr).startswith("error: ")
    assert says.format(tmp_path) in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert "starting Prefect" not in done.stdout


def test_a_dry_run_leaves_nothing_behind(tmp_path: Path, emoji_folder: Path, capfd: pytest.CaptureFixture) -> None:
    command = ("shard", "--dry-run", "--source", str(emoji_folder), "--home", str(tmp_path / "home"))
    assert diffusion(*command)[0] == 0
    out, err = capfd.readouterr()  # of the descriptors, which the program keeps libraries away from
    assert _told(err) == ""
    assert "nothing was published" in out
    assert list(tmp_path.iterdir()) == []
    code, _, err = diffusion(*command[:3], f"{tmp_path}/none", *command[4:])
    assert code == 2
    assert _told(err).startswith("error: ")
    assert list(tmp_path.iterdir()) == []


def _told(err: str) -> str:
    """What a command says on standard error, however slow the machine is."""
    return "".join(line for line in err.splitlines(keepends=True) if "still at work" not in line)


def test_what_libraries_print_goes_to_the_log(tmp_path: Path) -> None:
    program = f"""
import os, subprocess, sys
from pathlib import Path
from flows.console import quiet, say, error
say("before")
with quiet(Path({str(tmp_path)!r}, "logs", "a.log")):
    print("a library")
    print("its warning", file=sys.stderr)
    os.write(2, b"its C++\\n")
    subprocess.run(["echo", "its child"])
    say("during")
    say("/srv/[old]/[/]")
    error("wrong")
print("after")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split() == ["before", "during", "/srv/[old]/[/]", "after"]
    assert done.stderr == "error: wrong\n"
    log = (tmp_path / "logs" / "a.log").read_text()
    assert all(text in log for text in ("a library", "its warning", "its C++", "its child"))


def test_without_a_terminal_progress_is_a_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter([0.0, 1.0, 2.0, 12.0, 13.0, 21.0])
    update = console._plain("train", "pictures", now=lambda: next(clock))
    for done in (100, 200, 1_200, 1_300, 2_100):  # a resumed run: it starts at 100
        update(done, 2_100, note="" if done < 2_100 else "41 % of peak, waits 1 %", loss=0.25)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "  train     1,200 of 2,100 pictures (57 %), 100 pictures/s, 9.0 s left  loss 0.25",
        "  train     2,100 of 2,100 pictures (100 %), 100 pictures/s, 0.0 s left  41 % of peak, waits 1 %  loss 0.25",
    ]


def test_without_a_terminal_the_end_is_told_once_and_nothing_to_do_is_all_done(
    capsys: pytest.CaptureFixture[str],
) -> None:
    update = console._plain("verify", "MiB")
    for note in ("", "", "", "all", "all"):
        update(3, 3, note)
    console._plain("verify", "MiB")(0, 0)
    assert [line.split("verify")[1].strip() for line in capsys.readouterr().out.splitlines()] == [
        "3 of 3 MiB (100 %)",
        "3 of 3 MiB (100 %)  all",
        "0 of 0 MiB (100 %)",
    ]


def test_a_silence_is_worth_a_line_after_ten_seconds_and_then_after_twice_as_long() -> None:
    silence = console._Silence(100.0, every_s=10.0)
    lines = [now for now in range(100, 200) if silence.due(float(now))]
    assert lines == [110, 120, 140, 180]
    silence.broken(200.0)
    assert [now for now in range(200, 225) if silence.due(float(now))] == [210, 220]
    silence.moving += 1
    assert silence.due(1000.0) is None


def test_a_program_that_says_nothing_for_a_while_says_that_it_lives() -> None:
    program = """
import time
from flows.console import alive, moving, say
with alive(every_s=0.1):
    say("before")
    with moving():
        say("during")
    time.sleep(0.5)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split() == ["before", "during"]
    lines = done.stderr.splitlines()
    assert lines
    assert all(re.fullmatch(r"  still at work, nothing new for \d+\.\d s", line) for line in lines)


def test_durations_are_for_people() -> None:
    assert [console.seconds(s) for s in (0.04, 8.06, 59.9, 60, 307.9, 3_600)] == [
        "0.0 s",
        "8.1 s",
        "59.9 s",
        "1:00",
        "5:07",
        "60:00",
    ]
