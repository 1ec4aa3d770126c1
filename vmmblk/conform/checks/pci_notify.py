"""Doorbells: where they are, and what is written there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmmblk.client.pci import PciDevice
from vmmblk.conform.check import NotOffered, check, expect
from vmmblk.conform.function import only, plain, queue_count, submit
from vmmblk.conform.steps import served
from vmmblk.spec import CommonCfg, Feature, PciCapType

if TYPE_CHECKING:
    from vmmblk.client.driver import VirtioBlk
    from vmmblk.conform.target import Target

_QUEUE_SIZE = 64  # so that the rings of many queues fit into memory
_ROUNDS = 2


@check()
def notify_capability(target: Target) -> None:
    """A NOTIFY_CFG capability is there, with its multiplier behind the generic part (PCI-058, PCI-059)."""
    with target.connection() as connection:
        found = only(PciDevice(connection), PciCapType.NOTIFY_CFG)
        expect(found, "there is no NOTIFY_CFG capability")
        for each in found:
            expect(each.cap_len >= each.least_len, f"the {each.name} has length {each.cap_len}")


@check()
def doorbells_of_16_bits(target: Target) -> None:
    """Without NOTIFICATION_DATA offered there is an aligned place of 2 bytes for each queue (PCI-062 to 065)."""
    if target.offers(Feature.NOTIFICATION_DATA):
        raise NotOffered("NOTIFICATION_DATA is offered")
    _expect_room(target, 2)


@check(Feature.NOTIFICATION_DATA)
def doorbells_of_32_bits(target: Target) -> None:
    """With NOTIFICATION_DATA offered there is an aligned place of 4 bytes for each queue (PCI-066 to 069)."""
    _expect_room(target, 4)


def _expect_room(target: Target, width: int) -> None:
    with target.driver(start=False) as driver:
        driver.reset()
        for each in only(driver.pci, PciCapType.NOTIFY_CFG):
            step = each.multiplier
            good = step == 0 or (step & (step - 1) == 0 and step % width == 0)
            expect(good, f"the {each.name} has multiplier {step}")
            expect(each.offset % width == 0, f"the {each.name} has offset {each.offset:#x}")
            expect(each.length >= width, f"the {each.name} has {each.length:#x} bytes")
            for index in range(target.facts.queues):
                driver.device.select_queue(index)
                end = driver.device.get(CommonCfg.QUEUE_NOTIFY_OFF) * step + width
                expect(end <= each.length, f"queue {index} has its doorbell up to {end:#x} of {each.length:#x} bytes")


@check(each_ring=True)
def every_doorbell_works(target: Target) -> None:
    """16 bits with a queue's number, written to its doorbell, start that queue (PCI-060, PCI-070)."""
    with target.driver(features=plain(target), queues=queue_count(target), queue_size=_QUEUE_SIZE) as driver:
        _expect_service(target, driver)


@check()
def one_doorbell_for_all(target: Target) -> None:
    """With multiplier 0 the value tells which queue a doorbell is for (PCI-061)."""
    with target.connection() as connection:
        if PciDevice(connection).notify_off_multiplier:
            raise NotOffered("each queue has a doorbell of its own")
    target.require_queues(2)
    with target.driver(features=plain(target), queues=queue_count(target), queue_size=_QUEUE_SIZE) as driver:
        _expect_service(target, driver)


@check(Feature.NOTIFICATION_DATA, each_ring=True)
def doorbells_carry_positions(target: Target) -> None:
    """With NOTIFICATION_DATA 32 bits, number and position, start a queue (PCI-071)."""
    features = target.mask(Feature.NOTIFICATION_DATA, without=(Feature.NOTIF_CONFIG_DATA,))
    with target.driver(features=features, queues=queue_count(target), queue_size=_QUEUE_SIZE) as driver:
        _expect_service(target, driver, _QUEUE_SIZE + 1)


@check(Feature.NOTIF_CONFIG_DATA, each_ring=True)
def doorbells_carry_ids(target: Target) -> None:
    """With NOTIF_CONFIG_DATA queue_notif_config_data starts a queue, in 16 bits and in 32 (PCI-047, PCI-072)."""
    for without in ((Feature.NOTIFICATION_DATA,), ()):
        features = target.mask(Feature.NOTIF_CONFIG_DATA, without=without)
        with target.driver(features=features, queues=queue_count(target), queue_size=_QUEUE_SIZE) as driver:
            _expect_service(target, driver)


def _expect_service(target: Target, driver: VirtioBlk, rounds: int = _ROUNDS) -> None:
    queues = range(queue_count(target))
    for index in queues:
        for _ in range(_ROUNDS if index else rounds):
            served(target, driver, index)
    pendings = [submit(target, driver, index) for index in queues]
    for index in reversed(queues):
        driver.ring_doorbell(index)
    driver.wait_all(pendings)
