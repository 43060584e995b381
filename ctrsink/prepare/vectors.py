"""Every item's vector, computed once: in tasks of CHUNK items, which any process can do and none has to repeat."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ctrsink import storage
from ctrsink.dataset.arrow import from_parquet, pack, to_parquet, unpack
from ctrsink.dataset.manifest import VECTOR, EncoderEntry, read_file
from ctrsink.errors import InputError
from ctrsink.prepare.assemble import put
from ctrsink.prepare.encoder import FOLDER, Encoder, encoder_files, fingerprint, load_encoder
from ctrsink.prepare.execute import run_tasks
from ctrsink.prepare.items import Items
from ctrsink.prepare.job import Job
from ctrsink.prepare.results import column_of, numbers_of, path_of, read_named, write_named

CHUNK = 2048


@dataclass(frozen=True)
class Embedding:
    """The tasks."""

    encoding: "Encoding"
    texts: str
    """File of the texts of the items that have no vector yet."""
    folder: str
    """Where the vectors of each chunk go."""

    def __call__(self, number: int) -> int:
        """Encode chunk `number`; returns that number, once its vectors are written."""
        texts = column_of(self.texts, "text").slice(number * CHUNK, CHUNK).to_pylist()
        vectors = self.encoding.encoder().encode(texts)
        storage.write_bytes(path_of(self.folder, number, "vectors"), vectors.tobytes())
        return number

    def done(self) -> set[int]:
        """Chunks that an earlier preparation has encoded already."""
        return numbers_of(self.folder, "vectors")

    def result(self, number: int, width: int) -> np.ndarray:
        """Vectors of a chunk, float16 [items, width]."""
        return np.frombuffer(storage.read_bytes(path_of(self.folder, number, "vectors")), "<f2").reshape(-1, width)


@dataclass(frozen=True)
class Encoding:
    """The encoder of a data set that is being prepared, where every task can read it, and the vectors there are already."""

    folder: str
    names: tuple[str, ...]
    max_tokens: int
    name: str
    fingerprint: str
    width: int
    base: EncoderEntry | None

    @classmethod
    def of(cls, job: Job) -> "Encoding | None":
        """The data set's where there is one, else the one asked for, whose files it puts into the work folder; None: no vectors.

        Raises:
            InputError: the encoder cannot be used, or the data set that is appended to has none.
        """
        spec, to, base = job.spec.encoder, job.to, job.base
        if base is not None and base.encoder is not None:
            entry, folder = base.encoder, storage.join(to, FOLDER)
            for file in entry.files:
                read_file(to, file)
            names = tuple(file.path.removeprefix(f"{FOLDER}/") for file in entry.files)
            return cls(folder, names, entry.max_tokens, folder, entry.fingerprint, entry.width, entry)
        if spec is None:
            return None
        if base is not None:
            raise InputError(f"prepare.encoder is given, but the data set {to} was prepared without: set it to null")
        files = encoder_files(spec)
        found = fingerprint({name: storage.sha256(content) for name, content in files.items()}, spec.max_tokens)
        folder = storage.join(job.work, f"{FOLDER}-{found[:16]}")
        for name, content in files.items():
            storage.write_bytes(storage.join(folder, name), content)
        encoder = load_encoder(folder, spec.max_tokens, spec.path, found)
        return cls(folder, tuple(files), spec.max_tokens, spec.path, found, encoder.width, None)

    def encoder(self) -> Encoder:
        """The encoder itself."""
        return load_encoder(self.folder, self.max_tokens, self.name, self.fingerprint)

    def write_vectors(self, job: Job, items: Items) -> str:
        """Encode the items without a vector in the data set, and write those of all; returns the file, named by its content."""
        known = np.empty((0, self.width), np.float16)
        if self.base is not None:
            known = unpack(from_parquet(read_file(job.to, self.base.vectors)).column(VECTOR))
        path = write_named(job.work, "texts", items.table.select(["text"]).slice(len(known)))
        task = Embedding(self, path, job.folder("vectors", self.fingerprint, path))
        new = items.table.num_rows - len(known)
        pieces = [known]

        def take(number: int) -> tuple[float, int]:
            pieces.append(task.result(number, self.width))
            return len(pieces[-1]), len(pieces[-1])

        run_tasks(task, -(-new // CHUNK), job.execute, "encoded", take, new)
        return write_named(job.work, "vectors", pa.table({VECTOR: pack(np.concatenate(pieces))}))

    def entry(self, to: str, vectors: str) -> EncoderEntry:
        """Put the encoder and the file `vectors` into the data set `to`, for its manifest."""
        files = (
            self.base.files
            if self.base
            else tuple(
                put(to, storage.join(FOLDER, name), "", storage.read_bytes(storage.join(self.folder, name)))
                for name in self.names
            )
        )
        content = to_parquet(read_named(vectors))
        return EncoderEntry(
            files=files,
            max_tokens=self.max_tokens,
            fingerprint=self.fingerprint,
            width=self.width,
            vectors=put(to, storage.join(FOLDER, "vectors"), ".parquet", content, appended=self.base is not None),
        )
