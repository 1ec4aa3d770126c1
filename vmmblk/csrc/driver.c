/* The driver's half of a split virtqueue ("Split Virtqueues"). */
#include "driver.h"

#include <errno.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "virtio structures are little-endian; this file stores them natively"
#endif

#define RING_MAX 32768u
#define AVAIL_NO_INTERRUPT 1
#define USED_NO_NOTIFY 1

struct desc {
    uint64_t addr;
    uint32_t len;
    uint16_t flags;
    uint16_t next;
};

struct used_elem {
    uint32_t id;
    uint32_t len;
};

struct avail {
    _Atomic uint16_t flags;
    _Atomic uint16_t idx;
    _Atomic uint16_t ring[]; /* used_event follows the last slot */
};

struct used {
    _Atomic uint16_t flags;
    _Atomic uint16_t idx;
    struct used_elem ring[]; /* avail_event follows the last slot */
};

_Static_assert(sizeof(struct desc) == 16, "virtq_desc");
_Static_assert(offsetof(struct avail, ring) == 4 && offsetof(struct used, ring) == 4, "virtq_avail, virtq_used");

/* What the driver must remember about a descriptor is kept here, out of the device's reach. */
struct slot {
    uint16_t next;   /* in its chain, or in the free list */
    uint16_t length; /* of the chain that starts here, 0 if none does */
    uint32_t offers; /* times made available and not yet used */
};

struct vdrv_split {
    struct desc *desc;
    struct avail *avail;
    struct used *used;
    _Atomic uint16_t *used_event;
    const _Atomic uint16_t *avail_event;
    uint32_t size;
    uint32_t room;
    bool event_idx;
    uint16_t free_head;
    uint16_t avail_idx; /* of the next offer */
    uint16_t published;
    uint16_t judged; /* what was published when need_kick last decided */
    uint16_t used_idx; /* of the next element to pop */
    struct slot slots[];
};

static bool misaligned(const void *area, uintptr_t alignment)
{
    return area == NULL || ((uintptr_t)area & (alignment - 1)) != 0;
}

static uint16_t load(const _Atomic uint16_t *field, memory_order order)
{
    return atomic_load_explicit(field, order);
}

static void store(_Atomic uint16_t *field, uint16_t value, memory_order order)
{
    atomic_store_explicit(field, value, order);
}

vdrv_split *vdrv_split_new(void *desc, void *avail, void *used, uint32_t size, bool event_idx)
{
    if (size == 0 || size > RING_MAX || (size & (size - 1)) != 0 || misaligned(desc, 16) || misaligned(avail, 2) ||
        misaligned(used, 4)) {
        errno = EINVAL;
        return NULL;
    }
    vdrv_split *ring = calloc(1, sizeof(*ring) + size * sizeof(ring->slots[0]));
    if (ring == NULL)
        return NULL;
    memset(desc, 0, size * sizeof(struct desc));
    memset(avail, 0, 6 + 2 * (size_t)size);
    memset(used, 0, 6 + 8 * (size_t)size);
    ring->desc = desc;
    ring->avail = avail;
    ring->used = used;
    ring->used_event = &ring->avail->ring[size];
    ring->avail_event = (const _Atomic uint16_t *)(const void *)&ring->used->ring[size];
    ring->size = size;
    ring->room = size;
    ring->event_idx = event_idx;
    for (uint32_t i = 0; i < size; i++)
        ring->slots[i].next = (uint16_t)(i + 1);
    return ring;
}

void vdrv_split_free(vdrv_split *ring)
{
    free(ring);
}

uint32_t vdrv_split_room(const vdrv_split *ring)
{
    return ring->room;
}

int vdrv_split_reserve(vdrv_split *ring, uint32_t count, uint16_t *slots)
{
    if (count == 0)
        return -EINVAL;
    if (count > ring->room)
        return -ENOSPC;
    uint16_t slot = ring->free_head;
    for (uint32_t i = 0; i < count; i++) {
        slots[i] = slot;
        slot = ring->slots[slot].next;
    }
    ring->slots[slots[0]].length = (uint16_t)count;
    ring->free_head = slot;
    ring->room -= count;
    return 0;
}

static void release(vdrv_split *ring, uint16_t head)
{
    uint32_t count = ring->slots[head].length;
    uint16_t last = head;
    for (uint32_t i = 1; i < count; i++)
        last = ring->slots[last].next;
    ring->slots[last].next = ring->free_head;
    ring->slots[head].length = 0;
    ring->free_head = head;
    ring->room += count;
}

int vdrv_split_write(vdrv_split *ring, uint32_t slot, uint64_t iova, uint32_t len, uint16_t flags, uint16_t next)
{
    if (slot >= ring->size)
        return -EINVAL;
    ring->desc[slot] = (struct desc){.addr = iova, .len = len, .flags = flags, .next = next};
    return 0;
}

void vdrv_split_offer(vdrv_split *ring, uint16_t head)
{
    store(&ring->avail->ring[ring->avail_idx & (ring->size - 1)], head, memory_order_relaxed);
    ring->avail_idx++;
    if (head < ring->size)
        ring->slots[head].offers++;
}

static struct desc element(const struct vdrv_segment *segment, bool last, uint16_t next)
{
    return (struct desc){
        .addr = segment->iova,
        .len = segment->len,
        .flags = (uint16_t)((segment->flags & VDRV_WRITE) | (last ? 0 : VDRV_NEXT)),
        .next = last ? 0 : next,
    };
}

static int add_indirect(vdrv_split *ring, const struct vdrv_segment *segments, uint32_t count, uint64_t table_iova,
                        struct desc *table)
{
    uint16_t head;
    int error = vdrv_split_reserve(ring, 1, &head);
    if (error != 0)
        return error;
    for (uint32_t i = 0; i < count; i++)
        table[i] = element(&segments[i], i + 1 == count, (uint16_t)(i + 1));
    ring->desc[head] = (struct desc){.addr = table_iova, .len = count * 16, .flags = VDRV_INDIRECT};
    vdrv_split_offer(ring, head);
    return head;
}

int vdrv_split_add(vdrv_split *ring, const struct vdrv_segment *segments, uint32_t count, uint64_t table_iova,
                   void *table)
{
    if (count == 0 || count > RING_MAX)
        return -EINVAL;
    if (table != NULL)
        return add_indirect(ring, segments, count, table_iova, table);
    if (count > ring->room)
        return -ENOSPC;
    uint16_t head = ring->free_head;
    uint16_t slot = head;
    for (uint32_t i = 0; i < count; i++) {
        uint16_t next = ring->slots[slot].next;
        ring->desc[slot] = element(&segments[i], i + 1 == count, next);
        slot = next;
    }
    ring->slots[head].length = (uint16_t)count;
    ring->free_head = slot;
    ring->room -= count;
    vdrv_split_offer(ring, head);
    return head;
}

void vdrv_split_publish(vdrv_split *ring)
{
    ring->published = ring->avail_idx;
    store(&ring->avail->idx, ring->published, memory_order_release);
}

bool vdrv_split_need_kick(vdrv_split *ring)
{
    /* Between our store of idx and our load of the device's wish; the device has the mirror image of this fence. */
    atomic_thread_fence(memory_order_seq_cst);
    uint16_t fresh = (uint16_t)(ring->published - ring->judged);
    ring->judged = ring->published;
    if (fresh == 0)
        return false;
    if (ring->event_idx)
        return (uint16_t)(ring->published - load(ring->avail_event, memory_order_relaxed) - 1) < fresh;
    return (load(&ring->used->flags, memory_order_relaxed) & USED_NO_NOTIFY) == 0;
}

static uint16_t waiting(const vdrv_split *ring)
{
    return (uint16_t)(load(&ring->used->idx, memory_order_acquire) - ring->used_idx);
}

int vdrv_split_get_used(vdrv_split *ring, struct vdrv_used *out, uint32_t count)
{
    uint32_t ready = waiting(ring);
    if (ready > ring->size)
        return -EPROTO;
    if (count > ready)
        count = ready;
    for (uint32_t i = 0; i < count; i++) {
        const volatile struct used_elem *elem = &ring->used->ring[ring->used_idx & (ring->size - 1)];
        struct vdrv_used copy = {.id = elem->id, .len = elem->len};
        if (copy.id >= ring->size || ring->slots[copy.id].offers == 0)
            return i != 0 ? (int)i : -EPROTO;
        struct slot *slot = &ring->slots[copy.id];
        if (--slot->offers == 0 && slot->length != 0)
            release(ring, (uint16_t)copy.id);
        out[i] = copy;
        ring->used_idx++;
    }
    return (int)count;
}

uint32_t vdrv_split_arm(vdrv_split *ring, uint16_t ahead)
{
    if (ring->event_idx)
        store(ring->used_event, (uint16_t)(ring->used_idx + ahead - 1), memory_order_relaxed);
    else
        store(&ring->avail->flags, 0, memory_order_relaxed);
    atomic_thread_fence(memory_order_seq_cst);
    return waiting(ring);
}

void vdrv_split_disarm(vdrv_split *ring)
{
    if (ring->event_idx)
        store(ring->used_event, (uint16_t)(ring->used_idx - 1), memory_order_relaxed);
    else
        store(&ring->avail->flags, AVAIL_NO_INTERRUPT, memory_order_relaxed);
}

uint16_t vdrv_split_avail_idx(const vdrv_split *ring)
{
    return ring->avail_idx;
}

void vdrv_split_set_avail_idx(vdrv_split *ring, uint16_t idx)
{
    ring->avail_idx = idx;
    vdrv_split_publish(ring);
}

uint16_t vdrv_split_used_idx(const vdrv_split *ring)
{
    return load(&ring->used->idx, memory_order_acquire);
}

void vdrv_split_set_avail_flags(vdrv_split *ring, uint16_t flags)
{
    store(&ring->avail->flags, flags, memory_order_seq_cst);
}

void vdrv_split_set_used_event(vdrv_split *ring, uint16_t event)
{
    store(ring->used_event, event, memory_order_seq_cst);
}

uint16_t vdrv_split_used_flags(const vdrv_split *ring)
{
    return load(&ring->used->flags, memory_order_acquire);
}

uint16_t vdrv_split_avail_event(const vdrv_split *ring)
{
    return load(ring->avail_event, memory_order_acquire);
}
