"""Deliberately broken devices: each breaks one rule, in a copy of the tree, and names tests that must notice.

``broken(mutant, where)`` makes such a tree; ``python -m vmmblk serve`` in it serves the broken device.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Mutant:
    """In the files that match ``files``, ``old`` stands once and becomes ``new``; ``tests`` are pytest's arguments."""

    rule: str
    """The row that is broken, and how."""
    files: str
    old: str
    new: str
    tests: str
    setup: str = "everything"
    """What ``vmmblk conform`` must notice it with, see setups.py; empty if only one who sees the disk itself can."""


DEVICE, QUEUES, PCI, REQUEST = (f"tests/test_{name}.py" for name in ("device", "device_queues", "pci", "request"))
ZONED = "tests/test_conformance_zoned.py"
ENGINE, ENGINE_REQUESTS = "tests/test_engine.py -k", "tests/test_engine_requests.py -k"
RING, PACKED, REQUESTS = "tests/test_ring.py", "tests/test_ring_packed.py", "tests/test_server_requests.py -k"

MUTANTS = [
    # status and features
    Mutant(
        "PCI-037 status reads 0 before the reset is complete",
        "vmmblk/device.py",
        "            self._resetting = True\n            return [Reset()]",
        "            self._status = DeviceStatus(0)\n            return [Reset()]",
        DEVICE,
    ),
    Mutant(
        "HOSTILE-094 status bits count in any order",
        "vmmblk/device.py",
        "if value & bit and self._status & predecessors == predecessors:",
        "if value & bit:",
        DEVICE,
    ),
    Mutant(
        "STAT-007 needing a reset notifies nobody",
        "vmmblk/device.py",
        "return [StopQueues(), ConfigInterrupt()] if was_live else []",
        "return [StopQueues()] if was_live else []",
        DEVICE,
    ),
    Mutant(
        "FEAT-010 what was not offered can be acknowledged",
        "vmmblk/device.py",
        "(value << 32 * select & self.config.features)",
        "(value << 32 * select)",
        DEVICE,
        "plain",
    ),
    Mutant(
        "FEAT-006 features change after FEATURES_OK",
        "vmmblk/device.py",
        "if select > 1 or self._status & DeviceStatus.FEATURES_OK:",
        "if select > 1:",
        DEVICE,
    ),
    Mutant(
        "HOSTILE-105 feature windows repeat",
        "vmmblk/device.py",
        "return features >> 32 * select & 0xFFFFFFFF if select < 2 else 0",
        "return features >> 32 * (select & 1) & 0xFFFFFFFF",
        DEVICE,
    ),
    Mutant(
        "BLK-008 a read-only disk does not say so",
        "vmmblk/device.py",
        "Feature.BLK_RO: not info.read_write,",
        "Feature.BLK_RO: False,",
        DEVICE,
        "read-only",
    ),
    # configuration space
    Mutant(
        "CFG-004 the generation stays",
        "vmmblk/device.py",
        "self._generation = (self._generation + 1) & 0xFF",
        "pass",
        DEVICE,
    ),
    Mutant(
        "BLK-064 a disk grows in silence",
        "vmmblk/device.py",
        "        if self.live:\n            return [ConfigInterrupt()]\n        self._interrupt_owed = True\n",
        "",
        DEVICE,
    ),
    Mutant(
        "BLK-004 the capacity counts blocks",
        "vmmblk/device.py",
        "capacity=info.size_bytes // SECTOR_SIZE,",
        "capacity=info.size_sectors,",
        DEVICE,
        "4096",
    ),
    Mutant(
        "HOSTILE-119 the cache is switched without CONFIG_WCE",
        "vmmblk/device.py",
        "if self._resetting or not self._has(Feature.BLK_CONFIG_WCE) or not 0 <= position < len(data):",
        "if self._resetting or not 0 <= position < len(data):",
        DEVICE,
    ),
    # queues
    Mutant(
        "HOSTILE-062 any queue size is taken",
        "vmmblk/device.py",
        "def _is_queue_size(size: int, most: int, *, packed: bool = False) -> bool:\n    return ",
        "def _is_queue_size(size: int, most: int, *, packed: bool = False) -> bool:\n    return True or ",
        QUEUES,
    ),
    Mutant(
        "HOSTILE-065 addresses change under a live queue",
        "vmmblk/device.py",
        "        if queue.configurable:\n            queue.areas",
        "        if queue:\n            queue.areas",
        QUEUES,
    ),
    Mutant(
        "HOSTILE-074 a queue is reset without RING_RESET",
        "vmmblk/device.py",
        "if value != 1 or not self._has(Feature.RING_RESET) or queue.resetting:",
        "if value != 1 or queue.resetting:",
        QUEUES,
    ),
    Mutant(
        "PCI-106 a vector beyond the table is taken",
        "vmmblk/device.py",
        "return vector if vector < self.config.vectors else NO_VECTOR",
        "return vector",
        QUEUES,
    ),
    Mutant(
        "PCI-041 a queue that does not exist is another",
        "vmmblk/device.py",
        "return self._queues[self._queue_select] if self._queue_select < len(self._queues) else None",
        "return self._queues[self._queue_select % len(self._queues)]",
        QUEUES,
    ),
    # PCI
    Mutant(
        "PCI-003 the device id is the transitional one",
        "vmmblk/pci.py",
        "(_DEVICE_ID, 2, PCI_DEVICE_ID_BLK)",
        "(_DEVICE_ID, 2, 0x1001)",
        PCI,
    ),
    Mutant(
        "PCI-079 reading the ISR leaves it",
        "vmmblk/pci.py",
        "bytes([self._isr.take() & 0xFF])",
        "bytes([self._isr.peek() & 0xFF])",
        PCI,
    ),
    Mutant(
        "PCI-077 the interrupt status bit does not show the ISR",
        "vmmblk/pci.py",
        "if not self.msix_enabled and self._isr.peek():",
        "if not self.msix_enabled and False:",
        PCI,
    ),
    Mutant(
        "HOSTILE-127 the window takes any length",
        "vmmblk/pci.py",
        "usable = length in {1, 2, 4} and",
        "usable = length and",
        PCI,
    ),
    Mutant(
        "PCI-097 a read of the whole space acts on the window",
        "vmmblk/pci.py",
        "return offset == self._window + _CAP_DATA and length in {1, 2, 4}",
        "return offset <= self._window + _CAP_DATA < offset + length",
        PCI,
    ),
    Mutant(
        "PCI-099 the MSI-X table has one entry too many",
        "vmmblk/pci.py",
        "(self._device.config.vectors - 1).to_bytes(2",
        "self._device.config.vectors.to_bytes(2",
        PCI,
    ),
    Mutant(
        "PCI-021 all of configuration space can be written",
        "vmmblk/pci.py",
        "self.data[at] = self.data[at] & ~self._mask[at] | byte & self._mask[at]",
        "self.data[at] = byte",
        PCI,
    ),
    # requests
    Mutant(
        "BLK-056 an unknown type is an I/O error",
        "vmmblk/request.py",
        'raise BadRequest(Status.UNSUPP, f"request type {kind:#x} is not known")',
        'raise BadRequest(Status.IOERR, f"request type {kind:#x} is not known")',
        REQUEST,
    ),
    Mutant(
        "HOSTILE-147 bit 31 of the type is ignored",
        "vmmblk/request.py",
        "_OTHERS.get(kind)",
        "_OTHERS.get(kind & 0x7FFFFFFF)",
        REQUEST,
    ),
    Mutant(
        "BLK-084 undefined flags of a segment are ignored",
        "vmmblk/request.py",
        "if flags & ~flags_allowed:",
        "if flags & ~flags_allowed and False:",
        REQUEST,
    ),
    Mutant(
        "HOSTILE-178 segments past the end are left out",
        "vmmblk/request.py",
        "    if sector + sectors > end:\n        raise",
        "    if sector + sectors > end:\n        return Range(0, 0)\n        raise",
        REQUEST,
    ),
    Mutant(
        "HOSTILE-152 part of a sector is not supported",
        "vmmblk/request.py",
        "limits: Limits, status: Status = Status.IOERR",
        "limits: Limits, status: Status = Status.UNSUPP",
        REQUEST,
    ),
    Mutant(
        "HOSTILE-167 GET_ID fills what there is",
        "vmmblk/request.py",
        "GetId(min(writable, BLK_ID_BYTES))",
        "GetId(writable)",
        REQUEST,
    ),
    Mutant(
        "BLK-055 what the disk could not do is OK",
        "vmmblk/errors.py",
        "if isinstance(error, kind)), Status.IOERR)",
        "if isinstance(error, kind)), Status.OK)",
        f"{REQUESTS} errors_of_the_disk",
    ),
    Mutant(
        "BLK-065 writes are cached for a driver that cannot flush",
        "vmmblk/worker.py",
        "return self._write_cache and self._flushable is not None",
        "return self._flushable is not None",
        f"{REQUESTS} durability",
    ),
    Mutant(
        "BLK-067 a flush does nothing",
        "vmmblk/worker.py",
        "            if self._flushable is not None:\n                await _finished(self._flushable.flush())",
        "            pass",
        f"{REQUESTS} test_a_flush_covers",
    ),
    Mutant(
        "BLK-060 a read-only disk is written",
        "vmmblk/filters/checked.py",
        "if not (self._connected and self._read_write):\n            return",
        "if not self._connected:\n            return",
        "tests/test_filters.py tests/test_block_contract.py",
        "says it is read-only",
    ),
    # zones
    Mutant(
        "BLK-132 a sequential zone is written anywhere",
        "vmmblk/filters/zone_table.py",
        "if piece.offset != self._written[zone]:",
        "if piece.offset < 0:",
        ZONED,
        "zoned",
    ),
    Mutant(
        "BLK-139 what was there before a reset can be read",
        "vmmblk/filters/zone_table.py",
        "return max(0, min(piece.sectors, self._written[piece.zone] - piece.offset))",
        "return piece.sectors",
        ZONED,
        "zoned",
    ),
    Mutant(
        "BLK-147 any number of zones is open",
        "vmmblk/filters/zone_table.py",
        "if opens and limits.max_open and self.open >= limits.max_open and not self._implicit:",
        "if opens and not limits:",
        ZONED,
        "zoned",
    ),
    Mutant(
        "BLK-111 conventional zones take commands",
        "vmmblk/filters/zone_table.py",
        "if zone < self.conventional:\n            raise",
        "if zone < 0:\n            raise",
        ZONED,
        "zoned",
    ),
    Mutant(
        "BLK-115 appends are of any length",
        "vmmblk/request.py",
        "if readable > limits.max_append_sectors * SECTOR_SIZE:",
        "if readable and not limits.max_append_sectors:",
        ZONED,
        "failed zones",
    ),
    Mutant(
        "HOSTILE-199 an append has room for its sector and nothing else",
        "vmmblk/request.py",
        "if writable < ZONE_APPEND_SECTOR.size:",
        "if writable != ZONE_APPEND_SECTOR.size:",
        "tests/test_server_zoned.py",
        "zoned",
    ),
    Mutant(
        "BLK-160 a zone that was never written is closed",
        "vmmblk/filters/zone_table.py",
        "self._enter(zone, ZoneState.CLOSED if self._written[zone] else ZoneState.EMPTY)",
        "self._enter(zone, ZoneState.CLOSED)",
        ZONED,
        "zoned",
    ),
    # rings
    Mutant(
        "HOSTILE-013 tables are followed without INDIRECT_DESC",
        "vmmblk/csrc/*.c",
        "if (!c->indirect || indirect || d.flags & DESC_F_NEXT",
        "if (indirect || d.flags & DESC_F_NEXT",
        RING,
    ),
    Mutant(
        "HOSTILE-014 tables lead to tables",
        "vmmblk/csrc/*.c",
        "if (!c->indirect || indirect || d.flags & DESC_F_NEXT",
        "if (!c->indirect || d.flags & DESC_F_NEXT",
        RING,
    ),
    Mutant(
        "HOSTILE-032 the avail index may jump",
        "vmmblk/csrc/*.c",
        "return n > q->config.size ? -EPROTO : n;",
        "return n > q->config.size ? q->config.size : n;",
        RING,
    ),
    Mutant(
        "HOSTILE-003 entries past the end of a table are read",
        "vmmblk/csrc/*.c",
        "if (index >= entries || seen++",
        "if (seen++",
        RING,
    ),
    Mutant(
        "HOSTILE-009 readable elements may follow writable ones",
        "vmmblk/csrc/*.c",
        "	else if (w->writable)\n		return false;\n",
        "",
        RING,
    ),
    Mutant(
        "HOSTILE-025 read-only memory is written",
        "vmmblk/csrc/*.c",
        "if (!r || !r->addr || (r->prot & prot) != prot) {",
        "if (!r || !r->addr || !prot) {",
        RING,
        "default",
    ),
    Mutant(
        "RING-SPLIT-004 the status is the first byte of the last element",
        "vmmblk/csrc/*.c",
        "s->status_iova = w->held_iova + w->held_len - 1;",
        "s->status_iova = w->held_iova;",
        RING,
    ),
    Mutant(
        "RING-EVENT-006 used_event is ignored",
        "vmmblk/csrc/*.c",
        "return (uint16_t)(q->next_used - value - 1) < (uint16_t)(q->next_used - old);",
        "return q->next_used != old;",
        RING,
    ),
    Mutant(
        "RING-EVENT-002 the flag of the avail ring is ignored",
        "vmmblk/csrc/*.c",
        "!(value & AVAIL_F_NO_INTERRUPT)",
        "AVAIL_F_NO_INTERRUPT",
        RING,
    ),
    Mutant(
        "HOSTILE-052 marks of another lap count as available",
        "vmmblk/csrc/*.c",
        "return (flags & (DESC_F_AVAIL | DESC_F_USED)) == expected;",
        "return (flags & DESC_F_AVAIL) == (expected & DESC_F_AVAIL);",
        PACKED,
    ),
    Mutant(
        "HOSTILE-061 a packed list may run into slots in flight",
        "vmmblk/csrc/*.c",
        "if (slots == room || ",
        "if ((void)room, ",
        PACKED,
        "file, in Python",
    ),
    Mutant(
        "RING-PACKED-021 a used list is skipped by one slot",
        "vmmblk/csrc/*.c",
        "q->next_used = further(q, q->next_used, s->ring_slots);",
        "q->next_used = further(q, q->next_used, 1);",
        PACKED,
    ),
    Mutant(
        "RING-EVENT-018 the wrap counter of an event is ignored",
        "vmmblk/csrc/*.c",
        "uint32_t position = event & EVENT_WRAP ? slot : slot + q->config.size;",
        "uint32_t position = slot;",
        PACKED,
    ),
    Mutant(
        "PCI-075 a configuration change does not show in the ISR",
        "vmmblk/csrc/*.c",
        "	atomic_fetch_or(&d->isr, ISR_CONFIG);\n",
        "	(void)ISR_CONFIG;\n",
        RING,
    ),
    # the engine
    Mutant(
        "HOSTILE-154 the engine does not look where the disk ends",
        "vmmblk/csrc/*.c",
        "(e->target.sector_size - 1)) && *length <= size - *offset;",
        "(e->target.sector_size - 1));",
        "tests/test_engine.py::test_past_the_end[file-native]",
        "file",
    ),
    Mutant(
        "BLK-060 the engine writes disks that are read-only",
        "vmmblk/csrc/*.c",
        "	if (write && !e->target.writable)\n		return false;\n",
        "",
        f"{ENGINE} read_only",
        "read-only",
    ),
    Mutant(
        "BLK-090 the engine zeroes nothing",
        "vmmblk/csrc/*.c",
        "memset(from, 0, ranges[i].length);",
        "(void)from;",
        f"{ENGINE_REQUESTS} in_c_alone",
        "default",
    ),
    Mutant(
        "BLK-086 the engine takes any flag for zeroing",
        "vmmblk/csrc/*.c",
        "discard ? 0 : FLAG_UNMAP, &out[n])",
        "discard ? 0 : UINT32_MAX, &out[n])",
        f"{ENGINE_REQUESTS} refused",
        "default",
    ),
    Mutant(
        "HOSTILE-173 the engine takes segments that are not whole",
        "vmmblk/csrc/*.c",
        "c->readable % sizeof(payload[0]) || count > most",
        "count > most",
        f"{ENGINE_REQUESTS} refused",
        "default",
    ),
    Mutant(
        "HOSTILE-177 the engine discards and zeroes past the end",
        "vmmblk/csrc/*.c",
        " || sector > size / SECTOR || sectors > size / SECTOR - sector)",
        " || sector > size / SECTOR)",
        f"{ENGINE_REQUESTS} file-native",
        "file",
    ),
    Mutant(
        "BLK-089 zeroing gives space back that it may not unmap",
        "vmmblk/csrc/*.c",
        "if (discard || ranges[i].unmap)",
        "if (true)",
        f"{ENGINE_REQUESTS} given_back",
        "",
    ),
    Mutant(
        "BLK-067 the engine answers a flush and syncs nothing",
        "vmmblk/csrc/*.c",
        "return begin(t, op_of(l, c, TYPE_FLUSH));",
        "return DONE;",
        f"{ENGINE} durable",
        "",
    ),
    Mutant(
        "BLK-071 a write that the kernel failed is completed",
        "vmmblk/csrc/*.c",
        "bool well = went_well(op, result);",
        "bool well = went_well(op, result) || result < 0;",
        f"{ENGINE} write_that_fails",
        "",
    ),
]


def broken(mutant: Mutant, where: Path) -> None:
    """Make a copy of the tree at ``where`` with one rule broken, and build it if it is native code."""
    skip = shutil.ignore_patterns("__pycache__", ".pytest_cache", ".hypothesis")
    for folder in ("vmmblk", "tests"):
        shutil.copytree(REPO / folder, where / folder, ignore=skip)
    for file in ("pyproject.toml", "cffi_build.py", "README.md", "LICENSE"):
        shutil.copy(REPO / file, where)
    holders = [path for path in sorted(where.glob(mutant.files)) if mutant.old in path.read_text()]
    assert len(holders) == 1, f"{mutant.rule}: {mutant.old!r} stands in {len(holders)} of {mutant.files}, not in one"
    text = holders[0].read_text()
    assert text.count(mutant.old) == 1, f"{mutant.rule}: {mutant.old!r} stands {text.count(mutant.old)} times"
    holders[0].write_text(text.replace(mutant.old, mutant.new))
    if holders[0].suffix == ".c":
        environment = {key: value for key, value in os.environ.items() if key != "VMMBLK_WERROR"}
        subprocess.run([sys.executable, "cffi_build.py"], cwd=where, check=True, capture_output=True, env=environment)


def survives(mutant: Mutant, where: Path) -> str:
    """Run the tests of ``mutant`` in its tree; an empty string if one fails, else what pytest said."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *mutant.tests.split()]
    result = subprocess.run(command, cwd=where, capture_output=True, text=True, check=False, timeout=120)
    caught = result.returncode == 1 and "\nFAILED " in result.stdout
    return "" if caught else result.stdout + result.stderr
