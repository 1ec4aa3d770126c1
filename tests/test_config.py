"""From what the user typed to a disk."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

import pytest

from vmmblk.block import Operation, operations
from vmmblk.check import check_block
from vmmblk.config import open_disk, parse_size
from vmmblk.errors import ConfigError, IsReadOnly

if TYPE_CHECKING:
    from pathlib import Path

DISK = """
from __future__ import annotations
from pathlib import Path
from vmmblk import Block, BlockInfo

class Mine(Block):
    def __init__(self, size: int, *, fast: bool = False, ratio: float = 1.0, name="x", where: Path | None = None):
        self.info = BlockInfo(read_write=True, sector_size=512, size_sectors=size // 512)
        self.given = (size, fast, ratio, name, where)
        self.data = bytearray(size)

    async def read(self, sector_start, buffers):
        offset = sector_start * 512
        for buffer in buffers:
            buffer[:] = self.data[offset:offset + len(buffer)]
            offset += len(buffer)

    async def write(self, sector_start, buffers):
        offset = sector_start * 512
        for buffer in buffers:
            self.data[offset:offset + len(buffer)] = buffer
            offset += len(buffer)
"""

INFO = "info = BlockInfo(read_write=True, sector_size=512, size_sectors=8)"
READ = "async def read(self, sector_start, buffers): pass"


@pytest.fixture
def mydisk(tmp_path: Path) -> Path:
    """A user's disk in a file."""
    path = tmp_path / "mydisk.py"
    path.write_text(DISK)
    return path


def refusal(spec: object, *params: str, **options: object) -> str:
    """The line that ``open_disk`` refuses with."""
    with pytest.raises(ConfigError) as caught:
        open_disk(str(spec), params, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512", 512),
        ("1k", 1024),
        ("64KiB", 65536),
        ("512M", 512 << 20),
        ("1G", 1 << 30),
        ("1GB", 1 << 30),
        ("1.5GiB", 3 << 29),
        ("2t", 2 << 40),
        ("1P", 1 << 50),
        ("1E", 1 << 60),
        ("0", 0),
    ],
)
def test_parse_size(text: str, size: int) -> None:
    """Sizes are powers of 1024, however they are written."""
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1G", "1X", "1 G", "1,5G", "0x10", "1G1", "\u0661G"])
def test_parse_size_refuses_what_is_no_size(text: str) -> None:
    """With an example of one."""
    with pytest.raises(ConfigError, match="write it like"):
        parse_size(text)


def test_a_bare_number_has_the_unit_of_the_caller() -> None:
    """As in ``qemu -m 1024``."""
    assert parse_size("1024", unit="M") == 1 << 30
    assert parse_size("1k", unit="M") == 1024


@pytest.mark.parametrize("spec", ["memory:1M", "null:1M"])
@pytest.mark.parametrize("block_size", [None, 512, 4096])
def test_memory_and_null(spec: str, block_size: int | None) -> None:
    """The size is that of the whole disk."""
    info = open_disk(spec, block_size=block_size).info
    assert info.size_bytes == 1 << 20
    assert info.sector_size == (block_size or 512)


@pytest.mark.parametrize("more", [[], ["hugepages=on"]])
def test_memory_can_have_room_to_grow(more: list[str]) -> None:
    """max= reserves it."""
    disk = open_disk("memory:1M", ["max=2M", *more])
    disk.block.grow(4096)
    assert disk.info.size_bytes == 2 << 20


def test_a_path_is_a_file(tmp_path: Path) -> None:
    """With its own parameters, and a lock unless it is refused."""
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    first = open_disk(str(image))
    assert operations(first) == Operation.FLUSH | Operation.DISCARD | Operation.WRITE_ZEROES
    assert "in use" in refusal(image)
    open_disk(str(image), lock=False)
    open_disk(str(image), ["lock=off"])
    asyncio.run(first.disconnect())
    assert open_disk(str(image), ["direct=on"], block_size=4096).pins_memory


def test_a_path_may_look_like_a_kind_of_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image with a colon in its name is found, and memory: needs a path before it to be one."""
    monkeypatch.chdir(tmp_path)
    for name in ("foo:bar", "memory:1M"):
        (tmp_path / name).write_bytes(bytes(2 << 20))
    assert open_disk("foo:bar").info.size_bytes == 2 << 20
    assert open_disk("memory:1M").info.size_bytes == 1 << 20
    assert open_disk("./memory:1M").info.size_bytes == 2 << 20


@pytest.mark.parametrize("spec", ["memory:1M", "mydisk", "file"])
def test_any_disk_can_be_made_read_only(spec: str, mydisk: Path, tmp_path: Path) -> None:
    """The guest is told, and a write is refused."""
    (tmp_path / "disk.img").write_bytes(bytes(1 << 20))
    params = ["size=1M"] if spec == "mydisk" else []
    where = {"mydisk": str(mydisk), "file": str(tmp_path / "disk.img")}.get(spec, spec)
    disk = open_disk(where, params, read_only=True)
    assert not disk.info.read_write
    with pytest.raises(IsReadOnly):
        asyncio.run(disk.write(0, [memoryview(bytes(512))]))


@pytest.mark.parametrize(
    ("spec", "params", "message"),
    [
        ("floppy:1", [], "there is no disk floppy:...; use a path, memory:SIZE, null:SIZE or ./mydisk.py"),
        ("memory:", [], "is not a size"),
        ("memory:0", [], "must be a multiple of 512 bytes and not 0"),
        ("memory:1000", [], "must be a multiple of 512"),
        ("memory:7E", [], "make it smaller"),
        ("null:9999E", [], "smaller than 8 EiB"),
        ("null:1M", ["size=3"], "null:1M has no parameter size; it takes none"),
        ("memory:1M", ["maximum=3"], "it takes max"),
        ("memory:1M", ["max=many"], "'many' is not a size"),
        ("memory:1M", ["hugepages=2M"], "say hugepages=on or hugepages=off"),
        ("null:1M", ["size"], "'size' is not a parameter; write it as k=v"),
        ("memory:1M", ["max=1M", "max=2M"], "max is given twice"),
        ("/nowhere/disk.img", [], "does not exist"),
        ("/nowhere/disk.img", ["direct=maybe"], "say direct=on or direct=off"),
        ("/nowhere/disk.img", ["cache=on"], "it takes direct, bounce, lock"),
        ("/nowhere/disk.py", [], "does not exist"),
    ],
)
def test_what_cannot_be_opened_is_told_in_one_line(spec: str, params: list[str], message: str) -> None:
    """The line names what is wrong and what to do."""
    assert message in refusal(spec, *params)


def test_a_user_disk_gets_its_parameters_converted(mydisk: Path) -> None:
    """As the annotations of its constructor say; numbers may be sizes."""
    disk = open_disk(str(mydisk), ["size=1M", "fast=on", "ratio=0.5", "name=7", "where=/tmp"])
    given = disk.block.given
    assert given[:4] == (1 << 20, True, 0.5, "7")
    assert str(given[4]) == "/tmp"


def test_a_user_disk_keeps_the_contract(mydisk: Path) -> None:
    """What is loaded can be run through the checks."""
    asyncio.run(check_block(lambda: open_disk(str(mydisk), ["size=8192"])))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ([], "needs the parameter size; add size=..."),
        (["size=1M", "speed=3"], "has no parameter speed; it takes size, fast, ratio, name, where"),
        (["size=big"], "'big' is not a size"),
        (["size=1M", "fast=7"], "fast=7 is wrong; say fast=on or fast=off"),
        (["size=1M", "ratio=much"], "ratio=much is wrong: Expected `float`"),
        (["size=-1"], "Mine() failed with ValueError: negative count"),
        (["size=0"], "size_sectors is 0"),
    ],
)
def test_a_wrong_parameter_of_a_user_disk_is_named(mydisk: Path, params: list[str], message: str) -> None:
    """Missing, unknown or ill-typed: one line that names it."""
    assert message in refusal(mydisk, *params)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("", "defines no disk; write: class Disk(vmmblk.Block)"),
        ("class Disk(Block):", "the file failed with"),
        ("import nowhere_to_be_found", "the file failed with ModuleNotFoundError: No module named"),
        (f"class Disk(Block):\n {INFO}", "Disk has no read(); write it"),
        (f"class Disk(Block):\n {READ}", "Disk has no info; set self.info = BlockInfo(...)"),
        (f"class Disk(Block):\n info = 3\n {READ}", "Disk has no info"),
        (
            f"class Disk(Block):\n {INFO.replace('512', '1000')}\n {READ}",
            "sector_size is 1000; it must be a power of two",
        ),
        (f"class Disk(Block):\n {INFO.replace('512', '256')}\n {READ}", "sector_size is 256"),
        (f"class Disk(Block):\n {INFO}\n buffer_alignment = 3\n {READ}", "buffer_alignment is 3"),
        (f"class A(Block):\n {READ}\nclass B(Block):\n {READ}", "defines A, B; name the one to serve Disk"),
        (f"class Disk(Block):\n {READ}\n def __init__(self): 1 / 0", "Disk() failed with ZeroDivisionError"),
        (
            f"class Disk(Block):\n {READ}\n def __init__(self, x: Nope): pass",
            "reading the annotations failed with NameError",
        ),
        (
            f"class Disk(Block):\n {READ}\n @property\n def info(self): return {{}}[3]",
            "the disk failed with KeyError: 3",
        ),
    ],
)
def test_a_file_that_holds_no_usable_disk_is_told_in_one_line(tmp_path: Path, body: str, message: str) -> None:
    """Whatever is wrong with the user's code, it ends in one line."""
    path = tmp_path / "disk.py"
    path.write_text(f"from __future__ import annotations\nfrom vmmblk import Block, BlockInfo\n{body}\n")
    assert message in refusal(path)


def test_the_traceback_of_a_user_disk_is_in_the_debug_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The line says how to see it."""
    path = tmp_path / "disk.py"
    path.write_text(f"from vmmblk import Block\nclass Disk(Block):\n {READ}\n def __init__(self): 1 / 0\n")
    with caplog.at_level(logging.DEBUG, logger="vmmblk"):
        assert "--log-level debug" in refusal(path)
    assert "in __init__" in caplog.text


def test_a_config_error_of_a_user_disk_is_shown_as_it_is(tmp_path: Path) -> None:
    """A disk may refuse its parameters in its own words."""
    path = tmp_path / "disk.py"
    path.write_text(
        "from vmmblk import Block\nfrom vmmblk.errors import ConfigError\n"
        f"class Disk(Block):\n {READ}\n def __init__(self, n: int): raise ConfigError('n is too small; use 3')\n"
    )
    assert refusal(path, "n=1") == f"{path}: n is too small; use 3"


def test_of_several_disks_the_one_named_disk_is_served(tmp_path: Path) -> None:
    """Helpers and bases may stand beside it, and modules too."""
    (tmp_path / "beside_it.py").write_text(
        f"from vmmblk import Block, BlockInfo\nSIZE = 3\nclass Base(Block):\n {READ}\n"
    )
    path = tmp_path / "disk.py"
    path.write_text(
        "from vmmblk import BlockInfo\nfrom beside_it import Base, SIZE\n"
        "class Other(Base): pass\n"
        "class Disk(Other):\n info = BlockInfo(True, 512, SIZE)\n"
    )
    assert open_disk(str(path)).info.size_sectors == 3


def test_a_block_size_that_contradicts_a_user_disk_is_refused(mydisk: Path) -> None:
    """The disk itself says how big its sectors are."""
    assert "its sectors have 512 bytes; leave --block-size out" in refusal(mydisk, "size=1M", block_size=4096)
    open_disk(str(mydisk), ["size=1M"], block_size=512)
