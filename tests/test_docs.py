"""Documents go stale in silence: here every name, flag and link in them, and the worked example, is checked."""

import ast
import re
import sys
from contextlib import redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ScriptedSampler, tiny_run

import train
from baselines import BASELINES
from config import parse
from data import Pair
from rewards import VARIANTS, Variant

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import study  # noqa: E402

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
by_name = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
# Of torchrun, sbatch, pip, pytest, lm_eval and LiveCodeBench: flags of other programs that the documents show.
FOREIGN = {
    "--index-url",
    "--nproc-per-node",
    "--nnodes",
    "--rdzv-backend",
    "--rdzv-endpoint",
    "--rdzv-id",
    "--shutdown-timeout",
    "--nodes",
    "--ntasks-per-node",
    "--gpus-per-node",
    "--time",
    "--requeue",
    "--signal",
    "--model_args",
    "--apply_chat_template",
    "--include_path",
    "--system_instruction",
    "--batch_size",
    "--tasks",
    "--output_path",
    "--log_samples",
    "--fewshot_as_multiturn",
    "--confirm_run_unsafe_code",
    "--local_model_path",
}


@cache
def names_in(file: Path) -> set[str]:
    """Functions, classes, constants and, as Class.member, what classes hold; read, not imported."""
    names = set()
    for node in ast.parse(file.read_text()).body:
        found = _defined(node)
        names |= found
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{member}" for inner in node.body for member in _defined(inner)}
    return names


def _defined(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {target.id for target in targets if isinstance(target, ast.Name)}


def missing_names(text: str) -> list[str]:
    """Of `file.py: name`, `file.py: Class.member` and `tests/file.py::test`, those that do not exist."""
    named = re.findall(r"`([\w/]+\.py)(?:::|: )([\w.]+)`", text)
    # A flag of a command follows its script without a colon, so whatever looks like a name is meant as one.
    return [f"{file}: {n}" for file, n in named if not (ROOT / file).is_file() or n not in names_in(ROOT / file)]


def test_a_name_in_the_documents_was_renamed_or_removed():
    assert missing_names("`grpo.py: k3` `lm/record.py: Rollout.logp` `tests/test_docs.py::names_in`") == []
    assert missing_names("`grpo.py: k4` `gone.py: k3` `tests/test_grpo.py::test_k4`") == [
        "grpo.py: k4",
        "gone.py: k3",
        "tests/test_grpo.py: test_k4",
    ]
    for document in DOCUMENTS:
        assert missing_names(document.read_text()) == [], document.name


def test_the_tables_of_the_paper_name_code_and_tests():
    text = (ROOT / "docs" / "PAPER.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ") and "::" in line]
    assert len(rows) >= 30
    assert all(re.search(r"`[\w/]+\.py: ", row) for row in rows), "a test without the code that it pins"


def flags_of(file: Path) -> set[str]:
    """Every field of a dataclass, every parameter of a function, and every name that argparse or tyro is given."""
    flags = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            flags.add(node.target.id)
        if isinstance(node, ast.arguments):
            flags |= {a.arg for a in [*node.args, *node.kwonlyargs]}
        if isinstance(node, ast.keyword) and node.arg == "name" and isinstance(node.value, ast.Constant):
            flags.add(str(node.value.value))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("--"):
            flags.add(node.value.removeprefix("--"))
    return {"--" + flag.replace("_", "-") for flag in flags}


@cache
def training_flags() -> frozenset[str]:
    with redirect_stdout(StringIO()) as output, pytest.raises(SystemExit):
        parse(["--help"])
    return frozenset(re.findall(r"--[a-z][\w-]*", output.getvalue())) | {"--help"}


@by_name
def test_a_document_names_a_flag_that_no_program_has(document):
    others = ["evaluate.py", "data.py", *(f"tools/{name}.py" for name in ("rephrase", "plot"))]
    files = [ROOT / file for file in others] + sorted((ROOT / "benchmarks").glob("*.py"))
    known = training_flags() | FOREIGN | set().union(*map(flags_of, files))
    used = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", document.read_text()))
    assert used - known == set()


@pytest.mark.parametrize(
    "document",
    ["README.md", *(f"docs/{name}.md" for name in ("PAPER", "FORK", "METHODS", "EVALUATION", "PERFORMANCE"))],
)
def test_a_training_command_in_a_document_has_a_flag_that_train_refuses(document):
    text = (ROOT / document).read_text().replace("\\\n", " ")
    commands = re.findall(r"train\.py ((?:[^`\n|#])*--[^`\n|#]*)", text)
    assert commands
    for command in commands:
        used = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", command))
        assert used - training_flags() == set(), command


@by_name
def test_a_link_leads_nowhere(document):
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", document.read_text())
    relative = [target for target in targets if "://" not in target]
    assert [target for target in relative if not (document.parent / target).exists()] == []


def example_of(document: str) -> str:
    """The one block of Python in a document."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)
    return code


def one_step(variant: Variant, answers: list[str]) -> tuple[dict[str, float], dict[str, Any], bool]:
    """Metrics, the sample to read, and whether the policy moved; policy and teacher both give these answers."""
    run = tiny_run(variant, [Pair("a", "what", gold="4")], ScriptedSampler(lambda _, __, g: answers[g]))
    before = [parameter.clone() for parameter in run.policy.parameters()]
    seen, records = train.train_step(run, 0)
    (sample,) = records["rollouts"]
    return seen, sample, any(not torch.equal(p, q) for p, q in zip(before, run.policy.parameters(), strict=True))


def test_the_worked_reward_of_the_fork_guide_does_not_run():
    before = dict(VARIANTS)
    try:
        exec(compile(example_of("docs/FORK.md"), "docs/FORK.md", "exec"), {})
        (variant,) = [row for name, row in VARIANTS.items() if name not in before]
    finally:
        VARIANTS.clear()
        VARIANTS.update(before)
    answers = ["so \\boxed{4}", "\\boxed{4}", "surely it must be \\boxed{4}", "\\boxed{5}"]
    seen, sample, moved = one_step(variant, answers)
    assert sample["label"] == "4" and sample["label_from"] == "teacher on x"
    assert sample["rewards"] == [1.0, 1.0, 0.5, 0.0]  # the third agrees and is the longest
    assert seen["reward"] == 0.625 and seen["label_accuracy"] == 1.0 and moved


def test_the_reward_of_the_readme_does_not_run_at_the_end_of_baselines_py():
    namespace: dict[str, Any] = {"__name__": "baselines"}
    pasted = (ROOT / "baselines.py").read_text() + "\n\n" + example_of("README.md")
    exec(compile(pasted, "baselines.py", "exec"), namespace)
    ((_, variant),) = [(name, row) for name, row in namespace["BASELINES"].items() if name not in BASELINES]
    _, sure, moved = one_step(variant, [f"\\boxed{{{answer}}}" for answer in (4, 4, 5, 6)])
    assert sure["rewards"] == [0.5, 0.5, 0.25, 0.25] and moved
    _, unsure, _ = one_step(variant, [f"\\boxed{{{answer}}}" for answer in (4, 5, 6, 7)])
    assert unsure["rewards"] == [0.0] * 4


def test_the_study_replaces_another_table_or_the_text_beside_it(tmp_path):
    document = tmp_path / "RESULTS.md"
    document.write_text("# Title\n<!-- study-usual -->\n| old |\n| --- |\n\ntext\n\n<!-- study-noise -->\nend\n")
    for _ in range(2):
        study.publish(document, "study-usual", [["", "new"], ["I", "0.85 (0.82 to 0.89)"], ["II", "-"]])
        study.publish(document, "study-noise", [["noisy"], ["1"]])
        study.publish(document, "study-votes", [["", "change"], ["I", "+3.0 ± 1.0"], ["II", "0.5"]])
    tables = "<!-- study-usual -->\n|  | new |\n| --- | --- |\n| I | 0.85 (0.82 to 0.89) |\n| II | - |\n\ntext\n\n"
    assert document.read_text() == f"# Title\n{tables}<!-- study-noise -->\n| noisy |\n| --- |\n| 1 |\nend\n"
    usual = (tmp_path / "results" / "study-usual.csv").read_text()
    assert usual == "name,new,new lowest,new highest\nI,0.85,0.82,0.89\nII,,,\n"
    votes = (tmp_path / "results" / "study-votes.csv").read_text()
    assert votes == "name,change,change error\nI,+3.0,1.0\nII,0.5,\n"


def test_a_section_of_the_study_names_flags_that_do_not_exist_or_has_no_table():
    text = (ROOT / "docs" / "RESULTS.md").read_text()
    for name, rows in study.SECTIONS.items():
        table = f"results/{study.table_name(name)}.csv"
        assert (ROOT / "docs" / table).is_file() and f"]({table})" in text
        for flags in rows.values():
            parse(f"{flags} {study.ALWAYS}".split())


def test_a_method_that_asks_more_often_is_compared_at_the_same_step():
    history = [{"step": step, study.SAMPLED: step / 100} for step in (0, 10, 20, 30, 40)]
    flags = {"majority": 0.4, "II": 0.2, "III": 0.1, "majority --views both": 0.2, "scrl --votes 32": 0.1}
    for variant, accuracy in (flags | {"II --rollouts 4": 0.4, "majority --rollouts 4": None}).items():
        assert study.at_equal_answers(f"--variant {variant}", history) == accuracy, variant
