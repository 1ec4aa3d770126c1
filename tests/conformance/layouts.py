"""Our device laid out otherwise: other BARs, offsets, capabilities, doorbells and interrupts, all of them allowed.

``rebuilt(layout, where)`` makes a tree that serves it.  Whoever assumes the layout of vmmblk's own sources fails there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]

PCI, DEVICE, SERVER, VFU = "pci.py", "device.py", "server.py", "csrc/vfu.c"

_STATE = "    # --- state ---\n"  # a method that is put before this one replaces the one of its name


def _bars(table: int, pending: int, virtio: int) -> str:
    return f"MSIX_TABLE_BAR = {table}\nMSIX_PBA_BAR = {pending}\nVIRTIO_BAR = {virtio}\n"


def _places(common: int, isr: int, device: int, notify: int, size: int) -> str:
    return f"""\
COMMON_OFFSET = {common:#06x}
ISR_OFFSET = {isr:#06x}
DEVICE_OFFSET = {device:#06x}
NOTIFY_OFFSET = {notify:#06x}
VIRTIO_BAR_SIZE = {size:#06x}
"""


_BARS, _PLACES = _bars(1, 2, 4), _places(0x0000, 0x1000, 0x2000, 0x3000, 0x4000)


@dataclass(frozen=True)
class Layout:
    """``changes``: file below vmmblk, text that stands there once, and what becomes of it."""

    name: str
    changes: tuple[tuple[str, str, str], ...]
    arguments: tuple[str, ...]
    """What ``vmmblk serve`` is given beside the disk."""
    proves: tuple[str, ...]
    """Checks that apply to this device, and not to ours as it is."""


CROWDED = Layout(
    # 64-bit BAR 2 holds everything, the MSI-X table too; odd offsets; doorbells 16 bytes apart; structures longer than
    # what is known of them; capabilities in another order, of other kinds, with padding, one twice; two vectors for
    # four queues, and no INTx
    "crowded",
    (
        (PCI, _BARS, _bars(2, 2, 2)),
        (PCI, _PLACES, _places(0x4004, 0x0003, 0x2108, 0x1010, 0x10000)),
        (PCI, "NOTIFY_MULTIPLIER = 4\n", "NOTIFY_MULTIPLIER = 16\n"),
        (
            PCI,
            "_Structure(COMMON_OFFSET,",
            """\
_Structure(0x6000, self._msix_entries_size, self._read_msix_table, self._write_msix_table),
                _Structure(COMMON_OFFSET,""",
        ),
        (PCI, "(_INTERRUPT_PIN, 1, 1)", "(_INTERRUPT_PIN, 1, 0)"),
        (
            PCI,
            _STATE,
            """\
    def _lay_out_capabilities(self) -> None:
        space = self._space
        space.append_capability(bytes([0x01]) + bytes(6))
        table_size = (self._device.config.vectors - 1).to_bytes(2, "little")
        self._msix = space.append_capability(
            bytes([_CAP_ID_MSIX]) + table_size + _le32(MSIX_TABLE_BAR | 0x6000) + _le32(MSIX_PBA_BAR | 0x7000)
        )
        space.allow(self._msix + _MSIX_CONTROL, 2, _MSIX_CONTROL_WRITABLE)
        self._window = space.append_capability(_virtio_capability(PciCapType.PCI_CFG, 0, 0, _le32(0), bar=0))
        space.allow(self._window + _CAP_BAR, 1, 0xFF)
        space.allow(self._window + _CAP_OFFSET, 4, 0xFFFFFFFF)
        space.allow(self._window + _CAP_LENGTH, 4, 0xFFFFFFFF)
        space.allow(self._window + _CAP_DATA, 4, 0xFFFFFFFF)
        space.append_capability(bytes([_CAP_ID_VENDOR, 12, 9, 0x34, 0x12]) + b"secret")
        space.append_capability(_virtio_capability(8, 0x8000, 0x1000, bytes(8)))
        space.append_capability(_virtio_capability(PciCapType.DEVICE_CFG, DEVICE_OFFSET, 0x200, bytes(4)))
        space.append_capability(_virtio_capability(PciCapType.ISR_CFG, ISR_OFFSET, 1))
        doorbells = self._device.config.queues * NOTIFY_MULTIPLIER
        space.append_capability(
            _virtio_capability(PciCapType.NOTIFY_CFG, NOTIFY_OFFSET, doorbells, _le32(NOTIFY_MULTIPLIER))
        )
        for _ in range(2):
            space.append_capability(_virtio_capability(PciCapType.COMMON_CFG, COMMON_OFFSET, 0x80))

"""
            + _STATE,
        ),
        (DEVICE, "        return self.queues + 1\n", "        return 2\n"),
        (
            VFU,
            "vfu_setup_device_nr_irqs(ctx, VFU_DEV_INTX_IRQ, 1)",
            "vfu_setup_device_nr_irqs(ctx, VFU_DEV_INTX_IRQ, 0)",
        ),
    ),
    ("--queues", "4", "--features", "suspend=on,notification_data=on,notif_config_data=on"),
    ("pci_layout.shared_memory", "pci_layout.vendor_data"),
)

ONE_DOORBELL = Layout(
    # 32-bit BAR 0, all in one page; the MSI-X table in BAR 5, its pending bits in the middle of BAR 3; one doorbell for
    # all queues (multiplier 0); what is not offered reads back, to be refused with FEATURES_OK; and registers that tell
    # of an administration queue
    "one doorbell",
    (
        (PCI, _BARS, _bars(5, 3, 0)),
        (PCI, _PLACES, _places(0x0100, 0x0200, 0x0300, 0x0000, 0x1000)),
        (PCI, "_BAR_64BIT_PREFETCHABLE = 0xC\n", "_BAR_64BIT_PREFETCHABLE = 0\n"),
        (
            PCI,
            "(_bar(VIRTIO_BAR), 8, -self.bar_size(VIRTIO_BAR) & 0xFFFFFFFFFFFFFFFF)",
            "(_bar(VIRTIO_BAR), 4, -self.bar_size(VIRTIO_BAR) & 0xFFFFFFFF)",
        ),
        (PCI, "_le32(MSIX_PBA_BAR)", "_le32(MSIX_PBA_BAR | 0x800)"),
        (PCI, "NOTIFY_MULTIPLIER = 4\n", "NOTIFY_MULTIPLIER = 0\n"),
        (PCI, "_Structure(NOTIFY_OFFSET, device.config.queues * NOTIFY_MULTIPLIER,", "_Structure(NOTIFY_OFFSET, 4,"),
        (PCI, "doorbells = self._device.config.queues * NOTIFY_MULTIPLIER\n", "doorbells = 4\n"),
        (
            PCI,
            "self._device.doorbell(offset // NOTIFY_MULTIPLIER, data)",
            "self._device.doorbell(int.from_bytes(data[:2], 'little') & 0x3FFF if not offset else 0xFFFF, data)",
        ),
        (SERVER, "doorbell_bar=VIRTIO_BAR", "doorbell_bar=9"),
        (SERVER, "doorbell_stride=NOTIFY_MULTIPLIER", "doorbell_stride=4"),
        (
            DEVICE,
            "        Feature.SUSPEND: True,\n",
            "        Feature.SUSPEND: True,\n        Feature.ADMIN_VQ: True,\n",
        ),
        (DEVICE, "0,  # admin_queue_index", "self.config.queues,"),
        (DEVICE, "0,  # admin_queue_num", "1,"),
        (DEVICE, "(value << 32 * select & self.config.features)", "(value << 32 * select)"),
        (
            DEVICE,
            "        zoned = self._has(Feature.BLK_ZONED)\n",
            """\
        zoned = self._has(Feature.BLK_ZONED)
        if self._driver_features & ~self.config.features:
            self._status &= ~DeviceStatus.FEATURES_OK
            return
""",
        ),
    ),
    ("--queues", "3"),
    (
        "features.admin_vq_announces_queues",
        "pci_common.admin_queues",
        "pci_common.mirrored_features_are_refused",
        "pci_notify.one_doorbell_for_all",
    ),
)

INTX_ONLY = Layout(
    # no MSI-X: no capability, no vectors
    "INTx only",
    (
        (DEVICE, "        return self.queues + 1\n", "        return 0\n"),
        (
            PCI,
            """\
        self._msix = space.append_capability(
            bytes([_CAP_ID_MSIX]) + table_size + _le32(MSIX_TABLE_BAR) + _le32(MSIX_PBA_BAR)
        )
        space.allow(self._msix + _MSIX_CONTROL, 2, _MSIX_CONTROL_WRITABLE)
""",
            "",
        ),
        (PCI, 'table_size = (self._device.config.vectors - 1).to_bytes(2, "little")', "pass"),
        (PCI, "return bool(self._space.get(self._msix + _MSIX_CONTROL, 2) & _MSIX_ENABLE)", "return False"),
    ),
    ("--queues", "2"),
    (),
)

LAYOUTS = (CROWDED, ONE_DOORBELL, INTX_ONLY)


def rebuilt(layout: Layout, where: Path) -> None:
    """Make a copy of the sources at ``where``, laid out so, and build it if native code is changed."""
    shutil.copytree(REPO / "vmmblk", where / "vmmblk", ignore=shutil.ignore_patterns("__pycache__"))
    for name, old, new in layout.changes:
        file = where / "vmmblk" / name
        text = file.read_text()
        assert text.count(old) == 1, f"{layout.name}: {old!r} stands {text.count(old)} times in {name}"
        file.write_text(text.replace(old, new))
    if any(name.endswith(".c") for name, *_ in layout.changes):
        shutil.copy(REPO / "cffi_build.py", where)
        environment = {key: value for key, value in os.environ.items() if key != "VMMBLK_WERROR"}
        subprocess.run([sys.executable, "cffi_build.py"], cwd=where, check=True, capture_output=True, env=environment)
