"""Fixtures for all tests: a tiny teacher, real documents, and an environment without internet access."""

import gc
import os
import signal
import subprocess
import sys

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "TOKENIZERS_PARALLELISM": "false",
}

# The problems are tiny: several threads would take four times as long, most of it waiting for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import settings
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

# Same examples in every run, so that a failure is due to the current change; `make test-long` draws new ones.
settings.register_profile("repeated", derandomize=True, deadline=None)
settings.register_profile("drawn", deadline=None, print_blob=True)
settings.load_profile("repeated")

ROOT = Path(__file__).parents[1]

# Processes that the tests start find the tests' own modules, and run nothing else that lies in the working folder.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


# A shell starts background jobs deaf to Ctrl-C, and their children inherit that; tests press it.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Compile once what numba compiles, while the parallel processes collect the tests."""
    parallel = session.config.getoption("numprocesses", None) and "PYTEST_XDIST_WORKER" not in os.environ
    if parallel and not any(ROOT.glob("storage/__pycache__/kernels.head_gaps-*.nbi")):
        compiling = subprocess.Popen([sys.executable, "-m", "tests.kernels"], cwd=ROOT)
        session.config.add_cleanup(compiling.wait)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the files with the longest tests first, so that parallel processes finish at about the same time."""
    long = ["end_to_end", "worker_pool", "launch", "deploy", "mix", "signals", "resume", "flows", "server", "fsdp"]
    long += ["capture", "further", "train", "evaluate", "report", "crashes", "dataset", "readme", "architecture"]
    files = [f"test_{name}.py" for name in long]
    items.sort(key=lambda item: files.index(item.path.name) if item.path.name in files else len(files))


class ByServer(LoadFileScheduling):
    """Gives whole files to parallel processes, and all that share a Prefect server to one: starting it takes long."""

    def _split_scope(self, nodeid: str) -> str:
        file: str = super()._split_scope(nodeid)
        return "prefect" if _shares_server(file) else file


@cache
def _shares_server(file: str) -> bool:
    return 'usefixtures("prefect")' in (ROOT / file).read_text()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ByServer:
    return ByServer(config, log)


# Importing everything makes a million objects, among which there is no garbage to look for.
gc.disable()
frozen = 0
"""Number of modules whose objects the garbage collection leaves out, which would cost each training a second."""


def pytest_collection_finish() -> None:
    """Leave out all that the tests import."""
    _freeze()
    gc.enable()


def pytest_runtest_logfinish() -> None:
    """Leave out what was imported by a test."""
    if len(sys.modules) > frozen + 100:
        _freeze()


def _freeze() -> None:
    global frozen
    frozen = len(sys.modules)
    gc.collect()
    gc.freeze()


CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>'"
    " + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def topics() -> dict[str, str]:
    """Real English text that is part of Python, by topic name."""
    from pydoc_data.topics import topics

    return dict(sorted(topics.items()))


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama of 2 layers: 500 real token ids, padded to 512 rows, and a chat template."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny") / "teacher"
    tokenizer = _tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.2,  # otherwise the distribution would be nearly flat
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Parquet of 60 documents (id, text, source, year): short ones, and three that need several chunks."""
    pieces = [(name, text) for name, text in topics().items() if len(text) > 300]
    short = [(f"{name}-short", text[:300], "short", 2000 + i) for i, (name, text) in enumerate(pieces[:57])]
    long = [(f"{name}-long", text[:6000], "long", 1990) for name, text in pieces if len(text) > 6000][:3]
    path = tmp_path_factory.mktemp("documents") / "documents.parquet"
    columns = zip(*short, *long, strict=True)
    pq.write_table(pa.table(dict(zip(("id", "text", "source", "year"), map(list, columns), strict=True))), path)
    return path


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder; the current folder is a different, empty one."""
    for name in ("home", "here"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


@pytest.fixture(scope="session")
def moto() -> Iterator[str]:
    """URL of an S3 server with an empty bucket, for ``tests.buckets.environment``."""
    from tests import buckets

    with buckets.moto() as url:
        yield url


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of SmolLM2-135M-Instruct as bf16 safetensors; created once, and kept in .demo between runs."""
    from softlabel.pipeline.examples.language_model import prepare_teacher

    folder = ROOT / ".demo" / "teacher"
    prepare_teacher(folder)
    return folder


def _tiny_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((text[:2000] for text in topics().values()), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>"],
        chat_template=CHATML,
        model_max_length=2048,
    )
