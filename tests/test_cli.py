"""The command lines: the reference's still works, flags come from files too, and each script stands alone."""

import ast
import inspect
import re
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


def test_seed_zero_is_kept() -> None:
    """The reference's `if args.seed` took --seed 0 for none."""
    assert trainer.parse_args([*REQUIRED, "--seed=0"]).seed == 0


def test_the_schedules_are_diffusers() -> None:
    """All but the one that needs rules of its own."""
    [flag] = [flag for flag in flags_of(trainer) if flag.dest == "lr_scheduler"]
    assert set(flag.choices) == {kind.value for kind in SchedulerType} - {"piecewise_constant"}


def test_every_number_has_limits(capsys: pytest.CaptureFixture[str]) -> None:
    """Below 0, not a number, infinite, huge: none is taken, and all are told in one message with exit code 2."""
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


def test_all_mistakes_of_a_command_line_are_told_in_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    """Of different kinds; exit code 2."""
    wrong = ["--resolution=100", "--rank=0", "--learning_rate=nan", "--aspect_ratio_buckets=1"]
    with pytest.raises(SystemExit) as stop:
        trainer.parse_args([*REQUIRED, *wrong, "--with_prior_preservation"])
    message = capsys.readouterr().err.split("error:")[1]
    assert stop.value.code == 2 and "--class_prompt" in message
    assert all(flag.split("=")[0] in message for flag in wrong)


@both
def test_flags_from_a_file(script: ModuleType, required: list[str], tmp_path: Path) -> None:
    """A flag with its value a line, comments, quotes as in a shell; flags before the file lose, flags after it win."""
    path = tmp_path / "flags.txt"
    lines = ["# SD3.5", "", "--max_sequence_length 256  # tokens", "--revision=v2", "  --variant", "fp16"]
    path.write_text("\n".join([*lines, "--validation_prompt 'a # dog' \"b c\"", "--cache_dir 'my cache'"]))
    before, after = ["--revision=v1", "--variant=bf16"], ["--max_sequence_length=77"]
    args = script.parse_args([*required, *before, f"@{path}", *after])
    assert (args.max_sequence_length, args.revision, args.variant) == (77, "v2", "fp16")
    assert args.validation_prompt == ("a # dog", "b c") and args.cache_dir == "my cache"


@both
@pytest.mark.parametrize("wrong", [["--token", "hf_SECRET"], ["--token=hf_SECRET"], ["hf_SECRET"], ["@hf_SECRET"]])
def test_no_message_repeats_a_token(
    wrong: list[str], script: ModuleType, required: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """--token is no flag, and argparse's message about it would go into logs."""
    with pytest.raises(SystemExit):
        script.parse_args([*required, *wrong])
    captured = capsys.readouterr()
    assert "hf_..." in captured.err and "SECRET" not in captured.out + captured.err


def test_a_token_on_the_command_line_is_refused_with_wandb(capsys: pytest.CaptureFixture[str]) -> None:
    """As in the reference; the message does not repeat the token."""
    with pytest.raises(SystemExit):
        trainer.parse_args([*REQUIRED, "--hub_token=hf_SECRET", "--report_to=wandb"])
    message = capsys.readouterr().err
    assert "hf auth login" in message and "SECRET" not in message


@pytest.mark.parametrize("token", [" hf_x", "hf_x\r\n", "\thf_x "])
def test_a_token_is_stripped(token: str) -> None:
    """With a carriage return, as copied from Windows, it was in a traceback of the HTTP library."""
    assert trainer.parse_args([*REQUIRED, f"--hub_token={token}"]).hub_token == "hf_x"


SHARED = ["flag", "Parser", "argparse_options", "flag_problems", "first_line", "find_images", "sha256_of",
          "open_image",
          "UnreadableImageError", "reading_image", "load_part", "advice_on_model", "list_model_files",
          "missing_weights", "peak_memory", "flush_to_disk"]  # fmt: skip


@pytest.mark.parametrize("name", SHARED)
def test_what_both_scripts_need_stands_in_both_word_for_word(name: str) -> None:
    """Neither script imports the other, so the few shared functions are copies that may not drift apart."""
    assert inspect.getsource(getattr(embed, name)) == inspect.getsource(getattr(trainer, name))


def test_both_scripts_take_the_same_images() -> None:
    """By their suffixes, and by their contents."""
    assert embed.FORMATS == trainer.FORMATS


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


SIDE_EFFECTS = """
import ast, logging, os, signal, sys, warnings

def state():
    return list(warnings.filters), logging.root.manager.disable, dict(os.environ), signal.getsignal(signal.SIGTERM)

for name, required in (("compute_embeddings", []), ("train_dreambooth_sd3_lora_miniature", sys.argv[1:])):
    with open(f"{name}.py") as file:
        body = ast.parse(file.read()).body
    imports = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    exec(compile(ast.Module(imports, []), name, "exec"))  # what the libraries do is not ours
    before = state()
    __import__(name).parse_args(required)
    assert state() == before, name
    assert not {"bitsandbytes", "peft"} & sys.modules.keys()
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
