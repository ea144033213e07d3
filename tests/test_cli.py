"""The command lines: the reference's still works, flags come from files too, and each script stands alone."""

import ast
import inspect
import io
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from diffusers.optimization import SchedulerType

import compute_embeddings as embed
import train_dreambooth_sd3_lora_miniature as trainer
from conftest import ROOT
from fuzz import flags_of

REQUIRED = ["--pretrained_model_name_or_path=m", "--instance_data_dir=d", "--data_df_path=e", "--instance_prompt=p"]
REFERENCE_FLAGS = """
pretrained_model_name_or_path revision variant instance_data_dir data_df_path cache_dir instance_prompt
max_sequence_length validation_prompt num_validation_images validation_epochs rank output_dir seed resolution
center_crop random_flip train_batch_size num_train_epochs max_train_steps checkpointing_steps checkpoints_total_limit
resume_from_checkpoint gradient_accumulation_steps gradient_checkpointing learning_rate scale_lr lr_scheduler
lr_warmup_steps lr_num_cycles lr_power dataloader_num_workers weighting_scheme logit_mean logit_std mode_scale
optimizer use_8bit_adam adam_beta1 adam_beta2 adam_weight_decay adam_epsilon max_grad_norm push_to_hub hub_token
hub_model_id logging_dir allow_tf32 report_to mixed_precision prior_generation_precision local_rank
""".split()
BOTH = [(embed, []), (trainer, REQUIRED)]
both = pytest.mark.parametrize(("script", "required"), BOTH, ids=["compute_embeddings", "train"])


def test_bare_compute_embeddings_has_the_references_defaults() -> None:
    """Without flags it does the reference's job: its model, prompt, folder, length and file."""
    args = embed.parse_args([])
    assert args.pretrained_model_name_or_path == "stabilityai/stable-diffusion-3-medium-diffusers"
    assert (args.prompt, args.max_sequence_length) == ("a photo of sks dog", 77)
    assert (args.local_data_dir, args.output_path) == (Path("dog"), Path("sample_embeddings.parquet"))


def test_the_trainer_has_every_flag_of_the_reference() -> None:
    """Each of the reference's flags is still there under its name."""
    args = trainer.parse_args(REQUIRED)
    assert [name for name in REFERENCE_FLAGS if not hasattr(args, name)] == []


def test_both_scripts_take_both_names_of_what_they_share() -> None:
    """Prompt, folder and file are called differently in the reference's two scripts; mixing them up costs nothing."""
    names = [("prompt", "instance_prompt"), ("local_data_dir", "instance_data_dir"), ("output_path", "data_df_path")]
    first = [f"--{one}=x" for one, _ in names]
    second = [f"--{other}=x" for _, other in names]
    assert embed.parse_args(first) == embed.parse_args(second)
    model = "--pretrained_model_name_or_path=m"
    assert trainer.parse_args([model, *first]) == trainer.parse_args([model, *second])
    assert trainer.parse_args([model, *first]).instance_data_dir == Path("x")


def test_seed_zero_is_kept() -> None:
    """The reference's `if args.seed` took --seed 0 for none."""
    assert trainer.parse_args([*REQUIRED, "--seed=0"]).seed == 0


@pytest.mark.parametrize(
    ("script", "wrong", "expected"),
    [
        (trainer, ["--instance_dir", "x"], ["no flag --instance_dir; did you mean --instance_data_dir?"]),
        (trainer, ["--promt=a photo of sks dog"], ["no flag --promt; did you mean --prompt?"]),
        (trainer, ["--learning-rate", "1e-4"], ["no flag --learning-rate; did you mean --learning_rate?"]),
        (trainer, ["-seed", "1"], ["no flag -seed; did you mean --seed?"]),
        (trainer, ["--xyz"], ["no flag --xyz\n"]),
        (trainer, ["--t5_precision=none"], ["no flag --t5_precision here; compute_embeddings.py has it"]),
        (embed, ["--resolution=64", "--promt=x"], ["no flag --resolution here; train_dream", "--prompt?"]),
    ],
)
def test_a_mistyped_flag_is_answered_with_the_nearest(
    script: ModuleType, wrong: list[str], expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """In a line each and one about --help, not with a screen of usage and the required flags; exit code 2."""
    with pytest.raises(SystemExit) as stop:
        script.parse_args(wrong)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and all(part in message for part in expected)
    assert len(message.splitlines()) == len(expected) + 1 and message.endswith("\nSee --help for all flags.\n")


@pytest.mark.parametrize("word", [" ", "\\", "\\ "])
def test_a_backslash_that_continues_nothing_is_said(
    word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A space after it makes the space an argument, which would be one more prompt; a file of flags knows no \\."""
    (tmp_path / "flags.txt").write_text("--rank 8 \\\n--seed 1 \\\n")
    for wrong in (["--validation_prompt", "a dog", word], [f"@{tmp_path / 'flags.txt'}"]):
        with pytest.raises(SystemExit) as stop:
            trainer.parse_args([*REQUIRED, *wrong])
        message = capsys.readouterr().err
        assert stop.value.code == 2 and "backslash" in message and len(message.splitlines()) == 2


def test_missing_flags_are_answered_without_a_screen_of_usage(capsys: pytest.CaptureFixture[str]) -> None:
    """In two lines; all of them."""
    with pytest.raises(SystemExit) as stop:
        trainer.parse_args(["--rank=4"])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and len(message.splitlines()) == 2
    assert all(flag.split("=")[0] in message for flag in REQUIRED)


def test_values_may_look_like_flags() -> None:
    """What argparse takes for a value: a negative number, a text with a space, and what follows an equals sign."""
    args = trainer.parse_args([*REQUIRED, "--negative_prompt", "-blur --noise", "--cache_dir=--x"])
    assert (args.negative_prompt, args.cache_dir) == ("-blur --noise", "--x")


def test_the_schedules_are_diffusers() -> None:
    """All but the one that needs rules of its own."""
    [flag] = [flag for flag in flags_of(trainer) if flag.dest == "lr_scheduler"]
    assert set(flag.choices) == {kind.value for kind in SchedulerType} - {"piecewise_constant"}


def test_every_number_has_limits(capsys: pytest.CaptureFixture[str]) -> None:
    """Below 0, not a number, infinite, huge: none is taken, and all are reported in one message with exit code 2."""
    numbers = [flag for flag in flags_of(trainer) if flag.type in (int, float) and not flag.choices]
    assert len(numbers) > 30
    for kind, wrong in [
        (int, "-2"),
        (int, str(2**63)),
        (float, "-2"),
        (float, "1e31"),
        (float, "nan"),
        (float, "inf"),
    ]:
        signed = ("logit_mean", "mode_scale") if wrong == "-2" else ()
        names = [flag.dest for flag in numbers if flag.type is kind and flag.dest not in signed]
        with pytest.raises(SystemExit) as stop:
            trainer.parse_args([*REQUIRED, *(f"--{name}={wrong}" for name in names)])
        message = capsys.readouterr().err.split("error:")[1]
        assert stop.value.code == 2
        assert [name for name in names if f"--{name} {kind(wrong)} is not between" not in message] == []


def test_all_mistakes_of_a_command_line_are_reported_in_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    """Of different kinds; exit code 2."""
    wrong = ["--resolution=100", "--rank=0", "--learning_rate=nan", "--aspect_ratio_buckets=1"]
    with pytest.raises(SystemExit) as stop:
        trainer.parse_args([*REQUIRED, *wrong, "--with_prior_preservation"])
    message = capsys.readouterr().err.split("error:")[1]
    assert stop.value.code == 2 and "--class_prompt" in message
    assert all(flag.split("=")[0] in message for flag in wrong)


def test_flags_from_a_file(tmp_path: Path) -> None:
    """A flag with its value a line, comments, quotes as in a shell; flags before the file lose, flags after it win."""
    path = tmp_path / "flags.txt"
    lines = ["# SD3.5", "", "--max_sequence_length 256  # tokens", "--revision=v2", "  --variant", "fp16"]
    path.write_text("\n".join([*lines, "--validation_prompt 'a # dog' \"b c\"", "--cache_dir 'my cache'"]))
    before, after = ["--revision=v1", "--variant=bf16"], ["--max_sequence_length=77"]
    args = trainer.parse_args([*REQUIRED, *before, f"@{path}", *after])
    assert (args.max_sequence_length, args.revision, args.variant) == (77, "v2", "fp16")
    assert args.validation_prompt == ("a # dog", "b c") and args.cache_dir == "my cache"


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "with a byte order mark"])
def test_a_file_of_flags_from_windows(tmp_path: Path, mark: bytes) -> None:
    """Its paths keep their backslashes, with quotes and without, also at their end; a byte order mark is skipped."""
    path = tmp_path / "flags.txt"
    lines = [r"--cache_dir C:\Users\me\dog", r'--revision "C:\new dog\"', r"--validation_prompt '\t' \\server\share"]
    path.write_bytes(mark + "\r\n".join(lines).encode())
    args = trainer.parse_args([*REQUIRED, f"@{path}"])
    assert (args.cache_dir, args.revision) == (r"C:\Users\me\dog", "C:\\new dog\\")
    assert args.validation_prompt == (r"\t", r"\\server\share")


@pytest.mark.parametrize(
    "content",
    [
        "--revision a".encode("utf-16"),
        "--revision a".encode("utf-16-le"),
        "--revision ä".encode("latin-1"),
        b"--cache_dir a\n--revision 'a",
        b"@flags.txt",
    ],
    ids=["UTF-16", "UTF-16 without a mark", "latin-1", "open quote", "itself"],
)
def test_a_file_of_flags_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    """As a mistake on the command line is; exit code 2."""
    monkeypatch.chdir(tmp_path)
    Path("flags.txt").write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        trainer.parse_args([*REQUIRED, "@flags.txt"])
    assert stop.value.code == 2 and "flags.txt" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [["--token", "hf_SECRET"], ["--token=hf_SECRET"], ["hf_SECRET"], ["@hf_SECRET"]])
def test_no_message_repeats_a_token(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """--token is no flag, and argparse's message about it would go into logs."""
    with pytest.raises(SystemExit):
        trainer.parse_args([*REQUIRED, *wrong])
    captured = capsys.readouterr()
    assert "SECRET" not in captured.out + captured.err and ("hf_..." in captured.err or "--token" in captured.err)


def test_a_token_on_the_command_line_is_refused_with_wandb(capsys: pytest.CaptureFixture[str]) -> None:
    """As in the reference; the message does not repeat the token."""
    with pytest.raises(SystemExit):
        trainer.parse_args([*REQUIRED, "--hub_token=hf_SECRET", "--report_to=wandb"])
    message = capsys.readouterr().err
    assert "hf auth login" in message and "SECRET" not in message


def test_a_dash_of_a_word_processor_is_no_value(capsys: pytest.CaptureFixture[str]) -> None:
    """After a flag with several values it became two prompts, in silence."""
    with pytest.raises(SystemExit):
        trainer.parse_args([*REQUIRED, "--validation_prompt", "a dog", "\u2013max_sequence_length", "128"])
    assert "did you mean --max_sequence_length?" in capsys.readouterr().err


@pytest.mark.parametrize("quotes", ["''", "\u201c\u201d"])
def test_quotes_that_hold_no_words_together_are_named(quotes: str, capsys: pytest.CaptureFixture[str]) -> None:
    """cmd.exe knows double quotes alone, and a word processor makes them typographic."""
    for flag, text in (("--prompt", "a photo of sks dog"), ("--validation_prompt", "sks dog"), ("--prompt", "dog")):
        with pytest.raises(SystemExit):
            trainer.parse_args([*REQUIRED, flag, *f"{quotes[0]}{text}{quotes[1]}".split()])
        assert '"double quotes"' in capsys.readouterr().err


def test_commands_to_copy_are_quoted_as_their_system_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """cmd.exe passes on single quotes as letters."""
    command = ["python", "x.py", "--prompt", "a dog"]
    assert trainer.shell_line(command) == "python x.py --prompt 'a dog'"
    with monkeypatch.context() as patch:
        patch.setattr(trainer.os, "name", "nt")
        line = trainer.shell_line(command)
    assert line == 'python x.py --prompt "a dog"'


def test_a_hash_inside_a_word_of_a_file_is_no_comment(tmp_path: Path) -> None:
    """C:\\C#\\photos was cut to C:\\C."""
    (tmp_path / "flags.txt").write_text(
        '--output_dir C:\\C#\\run#3 # a comment\n# another\n--instance_prompt "a # b"\n'
    )
    args = trainer.parse_args([*REQUIRED, f"@{tmp_path / 'flags.txt'}"])
    assert str(args.output_dir) == "C:\\C#\\run#3" and args.instance_prompt == "a # b"


@pytest.mark.parametrize("token", [" hf_x", "hf_x\r\n", "\thf_x "])
def test_a_token_is_stripped(token: str) -> None:
    """With a carriage return, as copied from Windows, it was in a traceback of the HTTP library."""
    assert trainer.parse_args([*REQUIRED, f"--hub_token={token}"]).hub_token == "hf_x"


def definitions(script: ModuleType) -> dict[str, str]:
    """The source of each name that a script defines at its top level; imports are none."""
    source = inspect.getsource(script)
    lines = source.splitlines()
    found = {}
    for node in ast.parse(source).body:
        names = [node.name] if isinstance(node, ast.FunctionDef | ast.ClassDef) else []
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]
        start = min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", []))])
        for name in names:
            found[name] = "\n".join(lines[start - 1 : node.end_lineno])
    return found


OF_EACH_SCRIPT = {"main", "Args", "parse_args", "silence_libraries", "OTHER_SCRIPT", "FLAG_DETAILS"}


def test_what_both_scripts_define_is_the_same_word_for_word() -> None:
    """Neither imports the other, so what both need is a copy, which may not drift apart."""
    computing, training = definitions(embed), definitions(trainer)
    shared = computing.keys() & training.keys() - OF_EACH_SCRIPT
    assert len(shared) > 30
    assert [name for name in sorted(shared) if computing[name] != training[name]] == []
    assert computing.keys() & training.keys() >= OF_EACH_SCRIPT


@pytest.mark.parametrize("script", [embed, trainer])
def test_args_are_read_and_never_written(script: ModuleType) -> None:
    """What the command line said is what a checkpoint compares."""
    written = []
    for node in ast.walk(ast.parse(inspect.getsource(script))):
        if isinstance(node, ast.Attribute | ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
            written.append(ast.unparse(node.value))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "delattr"):
            written.append(ast.unparse(node.args[0]))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            written += [ast.unparse(node.func.value)] * (node.func.attr in ("update", "pop", "clear", "__setattr__"))
    assert not [target for target in written if re.search(r"\bargs\b", target)]


@both
def test_help_is_short(script: ModuleType, required: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """No line lists all flags at once, required ones are marked, and what has no default shows none."""
    with pytest.raises(SystemExit):
        script.parse_args(["--help"])
    shown = capsys.readouterr().out
    usage, empty = shown.splitlines()[:2]
    assert usage.startswith("usage: ") and usage.endswith(" [FLAGS]") and not empty
    assert shown.count("(required)") == len(required) and "default: None" not in shown


@both
def test_help_ends_with_an_example_that_can_be_pasted(
    script: ModuleType, required: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """In one line, and with this script's names alone: --output_path names what the other one writes."""
    with pytest.raises(SystemExit):
        script.parse_args(["--help"])
    shown = capsys.readouterr().out
    [command] = re.findall(rf"^.*{Path(script.__file__).name} (--.*)$", shown[shown.index("example:") :], re.MULTILINE)
    script.parse_args(shlex.split(command))
    others = {"--output_path", "--local_data_dir"} if script is trainer else {"--data_df_path", "--instance_data_dir"}
    assert others & set(re.findall(r"--\w+", shown)) == set()


def test_help_breaks_no_line_inside_a_layer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their list is long, and has no spaces on the command line."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        trainer.parse_args(["--help"])
    shown = capsys.readouterr().out
    assert [layer for layer in trainer.Args.lora_layers.split(",") if layer not in shown] == []


def test_an_unset_flag_is_not_shown_as_none(capsys: pytest.CaptureFixture[str]) -> None:
    """A resolution that does not work named --aspect_ratio_buckets, too."""
    with pytest.raises(SystemExit):
        trainer.parse_args([*REQUIRED, "--resolution=100"])
    message = capsys.readouterr().err
    assert "--resolution 100" in message and "None" not in message


SIDE_EFFECTS = """
import ast, logging, os, signal, sys, warnings

def state():
    return list(warnings.filters), logging.root.manager.disable, dict(os.environ), signal.getsignal(signal.SIGTERM)

for name, required, unwanted in (
    ("train_dreambooth_sd3_lora_miniature", sys.argv[1:], {"bitsandbytes", "peft", "transformers"}),
    ("compute_embeddings", [], {"bitsandbytes", "peft"}),
):
    with open(f"{name}.py") as file:
        body = ast.parse(file.read()).body
    imports = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom | ast.Try)]
    exec(compile(ast.Module(imports, []), name, "exec"))  # what the libraries do is not ours
    before = state()
    __import__(name).parse_args(required)
    assert state() == before, name
    assert not unwanted & sys.modules.keys(), unwanted & sys.modules.keys()
"""


def test_importing_a_script_has_no_side_effects() -> None:
    """No logging is disabled, no warning filtered, and what only training needs is not imported by parse_args."""
    command = [sys.executable, "-c", SIDE_EFFECTS, *REQUIRED]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", ["compute_embeddings.py", "train_dreambooth_sd3_lora_miniature.py"])
def test_each_script_works_alone(name: str, tmp_path: Path) -> None:
    """Copied out of the repository, it still starts, and says nothing but its help."""
    shutil.copy(ROOT / name, tmp_path)
    result = subprocess.run([sys.executable, name, "--help"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "usage:" in result.stdout and result.stderr == ""


@pytest.mark.parametrize("script", [embed, trainer])
def test_help_is_shown_in_ascii(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on Windows and with LANG=C; a superscript ended it in a UnicodeEncodeError."""
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, "ascii"))
    with pytest.raises(SystemExit) as ended:
        script.parse_args(["--help"])
    sys.stdout.flush()
    assert ended.value.code == 0 and b"usage:" in shown.getvalue() and capsys.readouterr().err == ""
