"""Flags and the file behind --config."""

import pytest

from train.config import Config, flatten, leaves
from train.flags import MEANS_OF, check, parse

NEEDED = ["--shards", "s", "--model", "m", "--out", "o"]

FIXED_NAMES = (
    *("shards", "model", "out", "steps", "epochs", "batch-packs", "micro-packs", "lr", "seed", "dtype", "device"),
    *("dp-replicate", "cp", "tp", "pp", "ep", "save-every", "resume", "eval-shards"),
)


def write(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return str(path)


def test_the_fixed_flags_exist_and_no_name_stands_twice():
    assert {name.replace("-", "_") for name in FIXED_NAMES} <= set(leaves())
    sections = [section for section, _ in leaves().values()]
    assert len(leaves()) == len(sections) == len(flatten(Config()))


def test_flags_reach_their_place_in_the_tree():
    config = parse(
        [*NEEDED, "--batch-packs", "6", "--lr", "3e-4", "--dtype", "bfloat16", "--no-export", "--dp-shard", "2"]
    )
    assert (config.data.shards, config.model.model, config.run.out) == (("s",), "m", "o")
    assert (config.data.batch_packs, config.optim.lr, config.model.dtype) == (6, 3e-4, "bfloat16")
    assert config.run.export is False
    assert config.layout.dp_shard == 2


def test_any_flag_can_stand_in_the_file_and_the_command_line_wins(tmp_path):
    text = "shards: a\nmodel: b\nout: c\nbatch-packs: 4\nmicro_packs: 2\nlr: 2e-5\nexport: false\nresume: auto\n"
    config = parse(["--config", write(tmp_path, text), "--batch-packs", "9", "--shards=d"])
    assert (config.data.shards, config.model.model, config.run.out) == (("d",), "b", "c")
    assert (config.data.batch_packs, config.data.micro_packs) == (9, 2)
    assert config.optim.lr == 2e-5, "YAML reads 2e-5 as a string"
    assert config.run.export is False
    assert config.run.resume == "auto"


def test_several_shard_folders_on_the_command_line_and_in_the_file(tmp_path):
    config = parse([*NEEDED, "--shards", "b:0.3", "--config", write(tmp_path, "eval-shards: [c, d]\n")])
    assert (config.data.shards, config.data.eval_shards) == (("s", "b:0.3"), ("c", "d"))


@pytest.mark.parametrize("name", sorted(leaves()))
def test_every_flag_means_the_same_on_the_command_line_and_in_the_file(name, tmp_path):
    values = {
        "attention": "cpu",
        "dtype": "bfloat16",
        "reduce_dtype": "bfloat16",
        "device": "cpu",
        "verify": "off",
        "on_nonfinite": "skip",
        "cp_method": "needed",
        "load": "broadcast",
        "pp_schedule": "gpipe",
    }
    values |= {
        "recompute": "full",
        "compile_backend": "eager",
        "lr": "0.5",
        "beta1": "0.5",
        "min_lr_ratio": "0.5",
    }
    values |= dict.fromkeys(("cp", "tp", "pp", "ep", "beta2", "weight_decay"), "1") | {"beta2": "0.25"}
    default = flatten(Config())[name]
    other = "3" if not isinstance(default, bool) else "false" if default else "true"
    value = values.get(name, other)
    flag = "--" + name.replace("_", "-")
    if value in ("true", "false"):
        line = [flag if value == "true" else flag.replace("--", "--no-")]
    else:
        line = [flag, value]
    text = (
        "".join(f"{key}: x\n" for key in ("shards", "model", "out") if key != name)
        + f"{name.replace('_', '-')}: {value}\n"
    )
    others = [part for key in ("shards", "model", "out") if key != name for part in (f"--{key}", "x")]
    if name in MEANS_OF:
        others += [f"--{MEANS_OF[name]}", *([] if name == "compile_backend" else ["2"])]
        text += f"{MEANS_OF[name]}: {'true' if name == 'compile_backend' else 2}\n"
    from_file, from_line = parse(["--config", write(tmp_path, text)]), parse([*others, *line])
    assert from_file == from_line
    assert flatten(from_line)[name] != flatten(Config())[name] or value == "1"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--shards is missing"),
        ([*NEEDED, "--batch-pack", "3"], "unrecognized arguments: --batch-pack"),
        ([*NEEDED, "--batch-packs", "0"], "--batch-packs must be greater than 0, not 0"),
        ([*NEEDED, "--micro-packs", "9"], "--micro-packs 9 makes rows longer than a step, all padding behind its pac"),
        ([*NEEDED, "--batch-packs", "2.5"], "--batch-packs takes one int, not '2.5'"),
        ([*NEEDED, "--lr", "fast"], "--lr takes one float"),
        ([*NEEDED, "--lr", "nan"], "--lr must be a finite number, not nan"),
        ([*NEEDED, "--max-grad-norm", "inf"], "--max-grad-norm must be a finite number, not inf"),
        ([*NEEDED, "--min-lr-ratio", "5"], "--min-lr-ratio is a share of --lr, at most 1, not 5.0"),
        ([*NEEDED, "--warmup-steps", "-1"], "--warmup-steps must not be negative"),
        ([*NEEDED, "--beta2", "1"], "must be below 1"),
        ([*NEEDED, "--dtype", "float16"], "--dtype must be one of auto, float32, bfloat16, not 'float16'"),
        ([*NEEDED, "--dp-shard", "0"], "--dp-shard must be at least 1"),
        ([*NEEDED, "--config", "/no/such.yaml"], "cannot be read: No such file"),
        (
            [*NEEDED, "--pp-split", "1,2"],
            "--pp-split says how --pp works and would be ignored: give --pp 2 or more, or",
        ),
        ([*NEEDED, "--pp-schedule", "zbv"], "--pp-schedule says how --pp works and would be ignored"),
        ([*NEEDED, "--cp-method", "ring"], "--cp-method says how --cp works and would be ignored"),
        ([*NEEDED, "--tp-plan", "lm_head=stream"], "--tp-plan says how --tp works and would be ignored"),
        ([*NEEDED, "--no-sp"], "--no-sp says how --tp works and would be ignored"),
        ([*NEEDED, "--compile-backend", "eager"], "would be ignored: give --compile, or leave it out"),
    ],
)
def test_wrong_flags_get_one_sentence(argv, message):
    with pytest.raises(ValueError, match=r".") as error:
        parse(argv)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch_pakcs: 3\n", "there is no flag batch_pakcs; did you mean batch-packs?"),
        ("a: [1\n", "line 2 is not YAML"),
        ("- a\n", "must hold `flag: value` lines, not a list"),
        ("batch-packs: true\n", "--batch-packs takes one int, not 'true'"),
        ("batch-packs: 2.5\n", "--batch-packs takes one int, not '2.5'"),
        ("eval-shards: [a, [b]]\n", "--eval-shards takes one string or a list of them"),
        ("export: 1\n", "--export must be true or false, not '1'"),
        ("eval-shards:\n", "--eval-shards takes one string or a list of them, not ''"),
    ],
)
def test_a_wrong_file_gets_one_sentence(text, message, tmp_path):
    with pytest.raises(ValueError, match=r".") as error:
        parse([*NEEDED, "--config", write(tmp_path, text)])
    assert message in str(error.value)


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as leaving:
        parse(["--help"])
    assert leaving.value.code == 0
    shown = capsys.readouterr().out
    assert all("--" + name.replace("_", "-") in shown for name in leaves())


def test_the_defaults_are_supported():
    check(parse(NEEDED))
