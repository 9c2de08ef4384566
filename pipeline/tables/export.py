"""Export: write a table, or part of it, as files that other programs read without softlabel.

Row group by row group, into a folder that gets its name when it is complete and durable.
"""

import json
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from softlabel.pipeline.config.export import ExportConfig, Format
from softlabel.pipeline.exclusive import scratch
from softlabel.pipeline.progress import Progress, Watch, unwatched
from softlabel.pipeline.tables.export_columns import EVERYTHING, TOKENS, Columns, trained_on
from softlabel.pipeline.tables.export_files import ArrowFiles, Files, ParquetFiles
from softlabel.pipeline.tables.find_rows import Condition
from softlabel.storage.codec import decode
from softlabel.storage.errors import UsageError
from softlabel.storage.places import durable
from softlabel.storage.schema import PARTITION, SEQUENCE, SOFT_LABELS
from softlabel.storage.upkeep import card
from softlabel.storage.views.row_groups import Group, load, outlines
from softlabel.storage.views.view import AnyTable, View, open_table

_STORED = tuple(name for name in SEQUENCE.names if name != PARTITION)


@dataclass(frozen=True)
class ExportedSplit:
    """What was written of one split."""

    sequences: int
    positions: int
    files: int | None
    """None in a dry run, like ``bytes``."""
    bytes: int | None


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote."""

    table: str
    version: int
    output: str
    format: str
    splits: dict[str, ExportedSplit]
    seconds: float
    dry_run: bool = False
    """Whether nothing was written, and this is what would be."""


def export(config: ExportConfig, watch: Watch = unwatched, *, dry_run: bool = False) -> ExportReport:
    """Write a table in the form of other programs; a dry run only counts the rows.

    Raises:
        UsageError: if the output exists or can't be written, no row matches, or the format can't hold this table.
        TableError: if the table can't be read.
    """
    started = time.monotonic()
    source, output = open_table(config.table), Path(config.output).absolute()
    _require_free(output)
    columns = _columns(source, config)
    carried = _carried(source)
    try:
        if dry_run:
            durable.require_permission(output)
            return ExportReport(
                source.location, source.version, str(output), config.format, _count(source, config), 0, True
            )
        durable.make_folder(output.parent)
        with scratch(output.parent) as folder:
            made = folder / output.name
            made.mkdir()
            splits = _write(source, config, columns, carried, made, watch)
            shutil.copytree(source.tokenizer, made / "tokenizer", copy_function=shutil.copyfile)
            text = _card(source, config, columns, carried, splits)
            (made / card.FILE).write_text(text, encoding="utf-8")
            durable.publish(made, output)
    except OSError as error:
        raise UsageError(
            "the export can't be written; nothing was left behind",
            expected="a writable folder, on a disk with free space",
            found=error,
            where=output,
            do="choose another output, or make room",
        ) from error
    return ExportReport(source.location, source.version, str(output), config.format, splits, time.monotonic() - started)


def _require_free(output: Path) -> None:
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UsageError(
            "the output exists already, and is not overwritten",
            expected="a folder that does not exist yet",
            found="a file" if output.is_file() else "a folder with files in it",
            where=output,
            do="choose another output, or delete this one first",
        )


def _columns(source: AnyTable, config: ExportConfig) -> Columns:
    if isinstance(source, View) and source.average:
        raise UsageError(
            "a view that averages teachers has no rows of its own to export",
            expected="a table, or a view that concatenates tables",
            found=config.table,
            do=f"export its tables: {', '.join(source.names)}",
        )
    for table in source.tables if config.format != "trl" else ():
        do = "use --format trl, which exports no soft labels"
        table.identity.require_known(["tail_log_masses"], table.location, "an export of its probabilities", do)
    if config.format in ("parquet", "datasets"):
        return EVERYTHING
    if source.tables[0].identity.classes:
        raise UsageError(
            f"the format {config.format} is for language models, and this table is a classifier's",
            expected="--format parquet or --format datasets",
            found=f"--format {config.format}",
            where=config.table,
        )
    return TOKENS if config.format == "trl" else trained_on(config.draws)


def _carried(source: AnyTable) -> pa.Schema:
    """The carried columns that all tables have in common."""
    first, *others = (table.carried for table in source.tables)
    common = [field for field in first if all(field in other for other in others)]
    return pa.schema([field for field in common if field.name not in EVERYTHING.about])


def _write(
    source: AnyTable, config: ExportConfig, columns: Columns, carried: pa.Schema, folder: Path, watch: Watch
) -> dict[str, ExportedSplit]:
    total = sum(shard.rows for table in source.tables for shard in table.shards(config.split))
    written: dict[str, ExportedSplit] = {}
    seen = 0
    for split in (config.split,) if config.split else ("train", "eval"):
        files: Files = (
            ArrowFiles(folder / split, "data") if config.format == "datasets" else ParquetFiles(folder / "data", split)
        )
        positions = sequences = 0
        with files:
            for group, keep in _wanted(source, config.where, split):
                if keep.any():
                    rows = load(source, group, [*_STORED, *SOFT_LABELS.names, *carried.names]).filter(pa.array(keep))
                    files.write(columns.make(rows, decode(rows, source.numbering), carried))
                    positions += int(rows.column("positions").to_numpy().sum())
                    sequences += len(rows)
                seen += len(keep)
                watch(Progress("export", seen, total, "sequences"))
        if files.names:
            files.describe(split)
            written[split] = ExportedSplit(sequences, positions, len(files.names), files.bytes)
    if not written:
        raise _nothing(config)
    if config.format == "datasets":
        (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(written)}), encoding="utf-8")
    return written


def _count(source: AnyTable, config: ExportConfig) -> dict[str, ExportedSplit]:
    """What ``_write`` would write of each split."""
    found: dict[str, ExportedSplit] = {}
    condition = Condition(source, config.where)
    for split in (config.split,) if config.split else ("train", "eval"):
        sequences = positions = 0
        for group, part in outlines(source, [*dict.fromkeys([*condition.columns, "positions"])], split):
            keep = condition(group, part)
            sequences += int(keep.sum())
            positions += int(part.column("positions").to_numpy()[keep].sum())
        if sequences:
            found[split] = ExportedSplit(sequences, positions, None, None)
    if not found:
        raise _nothing(config)
    return found


def _nothing(config: ExportConfig) -> UsageError:
    return UsageError(
        "there is no row to export; nothing was written",
        expected="a row" if config.where is None else f"a row for which this is true: {config.where}",
        found="no such row",
        where=config.table,
    )


def _wanted(source: AnyTable, where: str | None, split: str) -> Iterator[tuple[Group, NDArray[np.bool_]]]:
    """Each row group of a split, with (R,) which of its rows are exported."""
    condition = Condition(source, where)
    for group, part in outlines(source, condition.columns or ["chunk"], split):
        yield group, condition(group, part)


def _card(
    source: AnyTable, config: ExportConfig, columns: Columns, carried: pa.Schema, splits: Mapping[str, ExportedSplit]
) -> str:
    parquet = config.format != "datasets"
    files = [{"split": split, "path": f"data/{split}-*.parquet"} for split in splits] if parquet else []
    configs = [{"config_name": "default", "data_files": files}] if parquet else []
    name = card.named(source.location)
    about = columns.about | (
        dict.fromkeys(carried.names, "carried column of the documents") if columns is EVERYTHING else {}
    )
    sizes = [
        [split, *(f"{n:,}" for n in (size.sequences, size.positions, size.bytes))] for split, size in splits.items()
    ]
    selected = f"The rows for which this is true: {card.code(config.where)}\n\n" if config.where else ""
    return "\n".join(
        [
            card.heading(config.license, configs, pretty_name=f"Soft labels of {name}"),
            f"# Soft labels of {card.plain(name)}\n",
            "What a language model, the teacher, predicted at each position of many documents, for distilling other"
            " models from it. Written by " + f"{card.plain(card.made_by())} in the format {config.format}.\n",
            selected + card.table(["split", "sequences", "positions", "bytes"], sizes),
            "## Where it comes from\n",
            card.provenance(source.tables),
            "## Columns\n",
            card.definitions(about),
            "## How to read it\n",
            _READING[config.format],
            "The folder `tokenizer` has the teacher's tokenizer, for `AutoTokenizer.from_pretrained`.\n",
        ]
    )


_READING: Mapping[Format, str] = {
    "parquet": """```python
from datasets import load_dataset

rows = load_dataset("FOLDER")  # or polars.read_parquet("FOLDER/data/*.parquet")
```
""",
    "datasets": """```python
from datasets import load_from_disk

rows = load_from_disk("FOLDER")
```
""",
    "axolotl": """As the data of axolotl's KD plugin, which needs no preparation:

```yaml
plugins: [axolotl.integrations.kd.KDPlugin]
kd_trainer: true
kd_normalize_topk: false  # the targets have their probabilities; positions have different numbers of them
kd_temperature: 1.0
datasets:
  - path: FOLDER
    type:
```

The list of targets at token i is the distribution of token i + 1, as the plugin's loss takes it. With the draws among
the targets, use forward KL (`kd_beta: 0.0`): for other divergences, their shares are no probabilities. The reported
loss is then higher than the KL, by an amount that does not depend on the student.
""",
    "trl": """```python
from datasets import load_dataset
from trl import SFTTrainer

SFTTrainer(model, train_dataset=load_dataset("FOLDER", split="train"))
```

None of TRL's trainers reads stored soft labels: this is the text that the teacher read, with the mask of the table, for
example for a control that is trained on hard labels.
""",
}
"""How a program reads each format, as Markdown."""
