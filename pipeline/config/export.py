"""Settings of the command that writes a table in the form of other programs."""

from typing import Literal

from pydantic import field_validator

from softlabel.pipeline.config.base import Location, Settings

Format = Literal["parquet", "datasets", "axolotl", "trl"]


class ExportConfig(Settings):
    """Write a table, or part of it, as files that other programs read without softlabel.

    The folder is there when it is complete: an export that was killed leaves nothing, and is started again.
    """

    table: Location
    """Folder of the table or view; TABLE@12 or TABLE@tag exports that version instead of the newest."""
    output: Location
    """Folder to write, which must not exist yet."""
    format: Format = "parquet"
    """parquet writes everything that the table holds, as token ids and log-probabilities, for any program and for
    load_dataset. datasets writes the same for load_from_disk. axolotl writes what its KD plugin trains on. trl writes
    tokens and labels for the SFTTrainer; none of TRL's trainers reads stored soft labels."""
    where: str | None = None
    """Export only the rows for which this SQL expression is true; as for show."""
    split: Literal["train", "eval"] | None = None
    """Export only this split."""
    draws: bool = True
    """For axolotl: add the ids that were drawn from outside the head to the targets, each with its share of the
    remaining probability. The targets then add up to 1 and are unbiased for forward KL. Otherwise, they are only the
    head."""
    license: str = "unknown"
    """Licence for the card: an identifier of the Hugging Face hub, such as apache-2.0 or cc-by-4.0."""

    @field_validator("output")
    @classmethod
    def _is_local(cls, output: str) -> str:
        if "://" in output:
            raise ValueError("must be a folder on this machine; copy it to its place when it is complete")
        return output
