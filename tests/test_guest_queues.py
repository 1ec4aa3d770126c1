"""What a Linux guest makes of several queues, and of features that are off by default."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from guests import MIB, boot, make_image, serve, vfio_user_device

from vmmblk.spec import Feature

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.guest

SIZE = 64 * MIB

# One job for each of two CPUs, each with half of the disk, so that both queues are busy at once.
FIO = (
    "fio --name=verify --filename=/dev/vda --direct=1 --ioengine=io_uring --iodepth=16 --rw=randwrite --bsrange=4k-64k"
    " --numjobs=2 --cpus_allowed=0,1 --cpus_allowed_policy=split --size=16M --offset_increment=32M --fsync=64"
    " --verify=crc32c --verify_fatal=1 --eta=never --output=/tmp/fio || { cat /tmp/fio; exit 1; }"
)
# Off by default, and taken by every Linux; whether it takes the others depends.
TAKEN = {Feature.ACCESS_PLATFORM, Feature.ORDER_PLATFORM, Feature.NOTIFICATION_DATA}
OTHERS = {Feature.IN_ORDER, Feature.NOTIF_CONFIG_DATA, Feature.SUSPEND}
MORE = ",".join(f"{feature.name.lower()}=on" for feature in sorted(TAKEN | OTHERS))


@pytest.mark.parametrize(
    ("features", "engine"),
    [
        ("packed=on", "native"),
        ("packed=on", "python"),
        (f"packed=on,{MORE}", "native"),
        (f"packed=off,{MORE}", "native"),
        pytest.param(f"packed=off,{MORE}", "python", marks=pytest.mark.long),
    ],
)
def test_a_guest_uses_every_queue(tmp_path: Path, engine: str, features: str) -> None:
    """Two CPUs get a queue and a vector each, both are used, and what fio writes over them verifies (BLK-003)."""
    image = make_image(tmp_path / "disk.img", SIZE)
    command = f"""set -e
        ls /sys/block/vda/mq | wc -w
        cat /sys/block/vda/device/features; echo
        {FIO}
        grep -c 'virtio[0-9]*-req' /proc/interrupts
        awk '/virtio[0-9]*-req/ && $2 + $3 == 0 {{ exit 1 }}' /proc/interrupts"""
    with serve(tmp_path / "s", "--queues", "2", "--features", features, str(image), engine=engine) as server:
        result = boot(command, *vfio_user_device(server.socket), cpus=2, memory="384M")
        assert (server.stop(), server.log) == (0, "")
    assert result.status == 0, result.output
    queues, bits, vectors = result.output.split()
    assert (queues, vectors) == ("2", "2")
    taken = {Feature(bit) for bit, digit in enumerate(bits) if digit == "1"}
    assert Feature.BLK_MQ in taken
    assert (Feature.RING_PACKED in taken) == ("packed=on" in features)
    assert taken >= TAKEN if MORE in features else not TAKEN & taken
