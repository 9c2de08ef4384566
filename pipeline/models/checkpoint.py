"""A teacher's files: check, identify and load them.

A checkpoint is a folder that ``save_pretrained`` wrote, with safetensors; a hub model is downloaded into one. Nothing
is downloaded when a folder is given. Code that comes with a model runs only if ``trust_remote_code`` is set. Missing
weights are an error; they are never filled with random numbers.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from softlabel.pipeline.config.capture import TeacherConfig
from softlabel.pipeline.models.adapter import Adapter
from softlabel.pipeline.models.files import (
    MODEL_FILES,
    UntrustedCodeError,
    broken,
    first_line,
    locate,
    sha256,
    weight_files,
)
from softlabel.pipeline.models.multimodal import architecture_of, text_model
from softlabel.pipeline.models.pretrained import blank_model, load_config, load_model, load_tokenizer, transformers
from softlabel.storage.errors import TeacherError
from softlabel.storage.identity import TeacherIdentity


@dataclass(frozen=True)
class Checkpoint:
    """A teacher's files on disk, before any weight is loaded."""

    folder: Path
    revision: str | None
    """Commit of a hub model."""
    trust_remote_code: bool
    dtype: str
    labels: tuple[str, ...] = ()
    """Classes, if the documents' own labels take the teacher's place; then no weights are needed or loaded."""
    adapter: Adapter | None = None
    """Adapter that is merged into the weights when they are loaded."""

    @classmethod
    def find(cls, config: TeacherConfig) -> "Checkpoint":
        """The files of the teacher that the settings name; a hub model's are downloaded if they are not cached.

        Raises:
            TeacherError: if there is no such model, or it has no configuration or no weights in safetensors.
            UsageError: if a revision of a folder is given.
        """
        assert config.model is not None, "the settings are complete"
        files = (*MODEL_FILES, "*.py") if config.trust_remote_code else MODEL_FILES
        folder, revision = locate(config.model, "teacher", config.revision, files)
        adapter = None if config.adapter is None else Adapter.find(config.adapter)
        checkpoint = cls(folder, revision, config.trust_remote_code, config.dtype, config.labels, adapter)
        _require_config(checkpoint)
        if not config.labels:
            _ = checkpoint.weights
        return checkpoint

    @cached_property
    def config(self) -> Any:
        """The model's configuration."""
        try:
            return load_config(self.folder, trust_remote_code=self.trust_remote_code)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise broken("the teacher's config.json can't be read", self.folder, error) from None

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer, which has a fast backend.

        Raises:
            TeacherError: if there is no tokenizer, it can't be loaded, or it has no fast backend.
        """
        try:
            tokenizer = load_tokenizer(self.folder, trust_remote_code=self.trust_remote_code)
        except Exception as error:  # the backend raises a bare Exception on a broken file
            if (self.folder / "tokenizer.json").is_file() or isinstance(error, UntrustedCodeError):
                raise broken("the teacher's tokenizer can't be loaded", self.folder, error) from None
            raise _no_tokenizer_file(self.folder, error) from None
        if not tokenizer.is_fast:
            raise TeacherError(
                "the teacher's tokenizer has no fast backend",
                expected="a tokenizer.json",
                found=type(tokenizer).__name__,
                where=self.folder,
                do="convert it to a fast tokenizer with transformers, and save that with save_pretrained()",
            )
        return tokenizer

    @cached_property
    def weights(self) -> list[Path]:
        """The safetensors files with the weights."""
        try:
            files = weight_files(self.folder)
        except ValueError as error:
            raise broken("model.safetensors.index.json can't be read", self.folder, error) from None
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise TeacherError(
                "the teacher's weight files are missing",
                expected=f"safetensors files: {', '.join(missing)}",
                found=", ".join(sorted(path.name for path in self.folder.iterdir())) or "an empty folder",
                where=self.folder,
                do="load the model once with transformers and save it with save_pretrained(), which writes safetensors",
            )
        return files

    @property
    def identity(self) -> TeacherIdentity:
        """The teacher's identity now: hashes of the files that its logits depend on."""
        if self.labels:
            return TeacherIdentity(files={}, dtype="none")
        files = [self.folder / "config.json", *self.weights]
        if self.trust_remote_code:
            files += sorted(self.folder.glob("*.py"))
        with ThreadPoolExecutor() as threads:  # hashing releases the GIL
            hashes = threads.map(sha256, files)
            by_name = {f.name: h for f, h in zip(files, hashes, strict=True)}
        return TeacherIdentity(files=by_name, dtype=self.dtype, adapter=self.adapter and self.adapter.hash)

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the classes in the order of their ids; None for a language model.

        Raises:
            TeacherError: if the model is neither a causal language model nor a classifier with distinct classes.
        """
        return self.labels or self._saved_as.classes

    @property
    def padded_vocabulary(self) -> int:
        """Rows of the output layer; for a classifier, rows of the embedding."""
        return int(self.config.get_text_config().vocab_size)

    @property
    def vocabulary(self) -> int:
        """The tokenizer's highest token id plus 1, or the number of rows of the output layer if that is less."""
        return min(int(max(self.tokenizer.get_vocab().values())) + 1, self.padded_vocabulary)

    @cached_property
    def _saved_as(self) -> "_SavedAs":
        """Decides once, for all who read these files, whether the model is a language model or a classifier."""
        if is_classifier(self.config):
            return _SavedAs(transformers().AutoModelForSequenceClassification, _distinct_classes(self))
        return _SavedAs(_causal_architecture(self), None)

    def blank(self) -> Any:
        """The model without weights, for inspection; it takes no memory.

        Raises:
            TeacherError: if no model can be built from its configuration.
        """
        try:
            return blank_model(self._saved_as.architecture, self.config, trust_remote_code=self.trust_remote_code)
        except Exception as error:  # architectures raise many kinds of errors for wrong settings
            raise broken("no model can be built from the teacher's config.json", self.folder, error) from error

    def load(self, device_map: str | dict[str, Any], attention: str) -> Any:
        """The model in evaluation mode, with every weight from the files and the adapter merged into them.

        Args:
            device_map: device of each part, as in transformers; {"": device} puts all of it on one device.
            attention: attention implementation; auto lets transformers choose.

        Raises:
            TeacherError: if files are damaged, weights are missing, or the device does not have enough memory.
        """
        try:
            model, report = load_model(
                self._saved_as.architecture,
                self.folder,
                trust_remote_code=self.trust_remote_code,
                config=self.config,
                dtype=self.dtype,
                attn_implementation=None if attention == "auto" else attention,
                device_map=device_map,
            )
        except MemoryError:
            raise TeacherError(
                "the teacher does not fit on the device",
                expected=f"memory for {sum(path.stat().st_size for path in self.weights) / 1e9:.1f} GB of weights",
                found="out of memory",
                where=self.folder,
                do="use a larger device or teacher.dtype bfloat16, or spread it over several devices with "
                "teacher.device_map auto",
            ) from None
        except Exception as error:  # damaged files raise many kinds of errors
            if getattr(self.config, "quantization_config", None) is not None:
                raise _quantized(self.config, self.folder, error) from error
            if attention != "auto" and "attention" in str(error).lower():
                raise _no_attention(attention, self.folder, error) from error
            raise broken("the teacher can't be loaded", self.folder, error) from error
        missing = sorted(report["missing_keys"])
        if missing:
            raise TeacherError(
                "the teacher's files lack some of its weights",
                expected=f"every weight of {type(model).__name__}",
                found=f"{len(missing)} missing weights, starting with {', '.join(missing[:3])}",
                where=self.folder,
                do="download or save the model again",
            )
        return text_model((model if self.adapter is None else self.adapter.merged(model)).eval())


class _SavedAs(NamedTuple):
    """What a model was saved as."""

    architecture: Any
    """Which of transformers' Auto classes loads it."""
    classes: tuple[str, ...] | None
    """Those of a classifier."""


def _no_attention(attention: str, folder: Path, error: Exception) -> TeacherError:
    """The error for an attention implementation that is not available for this model on this machine."""
    return TeacherError(
        f"the teacher can't be loaded with teacher.attn_implementation {attention}",
        expected="an attention implementation that is installed and that this architecture supports",
        found=f"{type(error).__name__}: {first_line(error)}",
        where=folder,
        do="install the package that it needs, or leave out teacher.attn_implementation",
    )


def _no_tokenizer_file(folder: Path, error: Exception) -> TeacherError:
    """The error for a tokenizer that is not in the form that can be loaded without further packages."""
    files = ", ".join(sorted(path.name for path in folder.iterdir())[:20])
    return TeacherError(
        "the teacher's tokenizer can't be loaded",
        expected="tokenizer.json",
        found=f"{files}; {type(error).__name__}: {first_line(error)}",
        where=folder,
        do="download or save the model and its tokenizer again. A tokenizer in another form can be converted where the "
        "package that it needs is installed: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)",
    )


def _quantized(config: Any, folder: Path, error: Exception) -> TeacherError:
    """The error for a quantized model that this machine can't load."""
    settings = config.quantization_config
    settings = settings if isinstance(settings, dict) else settings.to_dict()
    return TeacherError(
        "this quantized teacher can't be loaded on this machine",
        expected="the packages and the device that its quantization needs",
        found=f"quant_method {settings.get('quant_method')}; {type(error).__name__}: {first_line(error)}",
        where=folder / "config.json",
        do="install these packages and use a GPU, or use the same model without quantization",
    )


def is_classifier(config: Any) -> bool:
    """Whether the model of this configuration was saved as a sequence classifier."""
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or [])


def class_names(config: Any) -> tuple[str, ...]:
    """Names of a classifier's classes in the order of their ids, which may differ from their order in the file."""
    return tuple(str(config.id2label[index]) for index in sorted(config.id2label))


def _distinct_classes(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The classes of a classifier that gives one distribution over classes with different names; refuses any other."""
    names = class_names(checkpoint.config)
    kind = checkpoint.config.problem_type or "single_label_classification"
    if kind != "single_label_classification" or len(names) < 2 or len(set(names)) < len(names):
        raise TeacherError(
            "this classifier does not give one probability distribution over its classes",
            expected="problem_type single_label_classification (or none), and two or more classes with different names "
            "in id2label",
            found=f"problem_type {kind}, {len(names)} classes with {len(set(names))} different names",
            where=checkpoint.folder / "config.json",
            do="correct config.json if it is wrong, or use another classifier",
        )
    return names


def _require_config(checkpoint: Checkpoint) -> None:
    """Refuse a folder without a model."""
    if not (checkpoint.folder / "config.json").is_file():
        raise TeacherError(
            "this folder does not contain a model",
            expected="config.json, tokenizer.json and model.safetensors",
            found=", ".join(sorted(path.name for path in checkpoint.folder.iterdir())[:20]) or "an empty folder",
            where=checkpoint.folder.absolute(),
            do="set teacher.model to a folder that save_pretrained() wrote; for a repository of this name on the hub,"
            " move or rename this folder, which comes first",
        )


def _causal_architecture(checkpoint: Checkpoint) -> Any:
    """Which of transformers' Auto classes loads a causal language model; refuses anything else, before it is loaded."""
    architectures, architecture = checkpoint.config.architectures or [], architecture_of(checkpoint.config)
    causal = architecture._model_mapping.get(type(checkpoint.config), None)
    remote = checkpoint.trust_remote_code and hasattr(checkpoint.config, "auto_map")
    if not remote and (causal is None or (architectures and causal.__name__ not in architectures)):
        raise TeacherError(
            "the teacher is neither a causal language model nor a sequence classifier",
            expected=causal.__name__ if causal else "an architecture that AutoModelForCausalLM supports",
            found=", ".join(architectures) or checkpoint.config.model_type,
            where=checkpoint.folder / "config.json",
            do="use a model that predicts the next token, or one that was saved as a sequence classifier",
        )
    return architecture
