"""A directory of regenerated rows: complete shards, what each of them holds, and the request that they answer.

    train-00000-of-00012.jsonl         rows; only a complete file has such a name
    regeneration/manifest.json         the request, with the hashes of data and target
    regeneration/shard-00000.json      what the shard holds; written after it, so that both are there or it is redone
    regeneration/provenance.json       written when the last shard is complete

Every file is written under another name and renamed. The records are in a folder of their own because training on a
directory reads every data file in it.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from .files import file_sha256, rename_flushed

RECORDS, MANIFEST = "regeneration", "manifest.json"
DATA_SUFFIXES = {".jsonl", ".json", ".parquet"}


@dataclass(frozen=True)
class RowShards:
    """
    Writes and finds shards.

    Args:
        path (`Path`): The directory.
        num_shards (`int`): Of the whole result.
        file_format (`str`): `"jsonl"` or `"parquet"`.
        schema (`pyarrow.Schema`, *optional*): Of Parquet rows; the same for all shards, or they could not be read
            together.
    """

    path: Path
    num_shards: int
    file_format: str
    schema: pa.Schema | None = None

    @property
    def records(self) -> Path:
        return self.path / RECORDS

    def shard_path(self, shard: int) -> Path:
        return self.path / f"train-{shard:05d}-of-{self.num_shards:05d}.{self.file_format}"

    def record_path(self, shard: int) -> Path:
        return self.records / f"shard-{shard:05d}.json"

    def begin(self, request: dict, process: int = 0) -> None:
        """
        Begins the directory, or continues it if it was begun by the same request.

        Args:
            request (`dict`): Everything that determines the rows, by the name that an error gives it.
            process (`int`, *optional*, defaults to 0): Number of this process; several may begin at once.

        Raises:
            ValueError: If the directory was begun by another request, or holds other data.
        """
        # In this order: another process that begins now writes its manifest before its first shard.
        foreign = sorted(file.name for file in self.path.glob("*") if file.suffix in DATA_SUFFIXES)
        manifest = self.records / MANIFEST
        if manifest.exists():
            self._check_request(self.request(), request)
            return
        if foreign:
            raise ValueError(
                f"`--output-dir` {self.path} holds {foreign[0]}, which no regeneration wrote; training would mix it "
                "with the new rows. Choose another directory."
            )
        self.records.mkdir(parents=True, exist_ok=True)
        self.write_record(manifest, request, process)

    def request(self) -> dict:
        """The request by which the directory was begun."""
        return json.loads((self.records / MANIFEST).read_text(encoding="utf-8"))

    def is_complete(self, shard: int) -> bool:
        return self.record_path(shard).exists()

    def num_complete(self) -> int:
        return sum(self.is_complete(shard) for shard in range(self.num_shards))

    def write(self, shard: int, rows: list[dict], record: dict) -> None:
        """Writes a shard and then its record. A shard without rows is its record only."""
        if rows:
            incomplete = self.records / f".{self.shard_path(shard).name}.incomplete"
            self._write_rows(incomplete, rows)
            record = {**record, "file": self.shard_path(shard).name, "sha256": file_sha256(incomplete)}
            rename_flushed(incomplete, self.shard_path(shard))
        self.write_record(self.record_path(shard), {"shard": shard, "num_rows": len(rows), **record})

    def write_record(self, path: Path, record: dict, process: int = 0) -> None:
        incomplete = path.with_name(f".{path.name}.{process}.incomplete")
        incomplete.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        rename_flushed(incomplete, path)

    def read_records(self) -> list[dict]:
        """The records of all complete shards, in order."""
        paths = [self.record_path(shard) for shard in range(self.num_shards) if self.is_complete(shard)]
        return [json.loads(path.read_text(encoding="utf-8")) for path in paths]

    def check_complete_shards(self) -> None:
        """
        Reads every complete shard.

        Raises:
            ValueError: Names the first one that is missing or was changed.
        """
        for record in self.read_records():
            if record["num_rows"] == 0:
                continue
            path = self.path / record["file"]
            if not path.exists() or file_sha256(path) != record["sha256"]:
                state = "was changed" if path.exists() else "is missing"
                raise ValueError(
                    f"The shard {path} {state} after it was written. Remove {self.record_path(record['shard'])}, and "
                    "the same command makes it again."
                )

    def _check_request(self, begun: dict, request: dict) -> None:
        for name in sorted(begun.keys() | request.keys()):
            if begun.get(name) != request.get(name):
                raise ValueError(
                    f"`{name}` was {begun.get(name)} when {self.path} was begun, got {request.get(name)}. Repeat the "
                    "first command to continue, or choose another `--output-dir`."
                )

    def _write_rows(self, path: Path, rows: list[dict]) -> None:
        if self.file_format == "parquet":
            pq.write_table(pa.Table.from_pylist(rows, schema=self.schema), path)
            return
        with path.open("w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
