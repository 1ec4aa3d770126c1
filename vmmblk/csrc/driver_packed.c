/* The driver's half of a packed virtqueue ("Packed Virtqueues").
 *
 * A position counts from 0 to twice the ring size: it tells the slot, and the wrap counter, 1 on the first lap.
 */
#include "driver.h"

#include <errno.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "virtio structures are little-endian; this file stores them natively"
#endif

#define PACKED_MAX 32768u
#define IDS 65536u
#define FLAG_AVAIL (1u << 7)
#define FLAG_USED (1u << 15)
#define EVENT_WRAP 0x8000u

enum { EVENT_ENABLE, EVENT_DISABLE, EVENT_DESC };

struct packed_desc {
    uint64_t addr;
    uint32_t len;
    uint16_t id;
    _Atomic uint16_t flags;
};

_Static_assert(sizeof(struct packed_desc) == 16, "pvirtq_desc");

/* What the driver must remember about a buffer id is kept here, out of the device's reach. */
struct buffer {
    uint16_t next;   /* in the free list */
    uint16_t length; /* slots that a list with this id takes */
    bool ours;       /* chosen by this file, so it goes back to the free list */
    uint32_t offers; /* lists made available and not yet used */
};

struct vdrv_packed {
    struct packed_desc *desc;
    _Atomic uint32_t *wish;             /* the driver's event suppression structure */
    const _Atomic uint32_t *their_wish; /* the device's */
    uint32_t size;
    uint32_t room;
    bool event_idx;
    uint32_t free_id;
    uint32_t avail;      /* position of the next descriptor */
    uint32_t published;  /* ... of the first that the device does not see yet */
    uint16_t held_flags; /* what makes that one visible, and all after it */
    uint32_t judged;     /* what was published when need_kick last decided */
    uint32_t used;       /* position of the next used descriptor */
    struct buffer buffers[IDS];
};

static uint32_t step(const vdrv_packed *ring, uint32_t position, uint32_t slots)
{
    return (position + slots) % (2 * ring->size);
}

static uint32_t slots_between(const vdrv_packed *ring, uint32_t from, uint32_t to)
{
    return to >= from ? to - from : to + 2 * ring->size - from;
}

static struct packed_desc *desc_at(vdrv_packed *ring, uint32_t position)
{
    return &ring->desc[position % ring->size];
}

static uint16_t available_bits(const vdrv_packed *ring, uint32_t position)
{
    return position < ring->size ? FLAG_AVAIL : FLAG_USED;
}

vdrv_packed *vdrv_packed_new(void *desc, void *driver, void *device, uint32_t size, bool event_idx)
{
    bool misaligned = (uintptr_t)desc & 15 || (uintptr_t)driver & 3 || (uintptr_t)device & 3;
    if (size == 0 || size > PACKED_MAX || misaligned) {
        errno = EINVAL;
        return NULL;
    }
    vdrv_packed *ring = calloc(1, sizeof(*ring));
    if (ring == NULL)
        return NULL;
    memset(desc, 0, size * sizeof(struct packed_desc));
    memset(driver, 0, 4);
    memset(device, 0, 4);
    ring->desc = desc;
    ring->wish = driver;
    ring->their_wish = device;
    ring->size = size;
    ring->room = size;
    ring->event_idx = event_idx;
    for (uint32_t i = 0; i < size; i++)
        ring->buffers[i].next = (uint16_t)(i + 1);
    return ring;
}

void vdrv_packed_free(vdrv_packed *ring)
{
    free(ring);
}

uint32_t vdrv_packed_room(const vdrv_packed *ring)
{
    return ring->room;
}

/* Ids below the ring's size are taken in turn, and there are as many as slots; one chosen by hand may be in flight. */
int vdrv_packed_reserve(vdrv_packed *ring, uint32_t count, uint32_t id)
{
    bool any = id == VDRV_ANY_ID;
    if (count == 0 || (!any && id >= IDS))
        return -EINVAL;
    if (count > ring->room || (any && ring->free_id >= ring->size))
        return -ENOSPC;
    if (any) {
        id = ring->free_id;
        ring->free_id = ring->buffers[id].next;
        ring->buffers[id].ours = true;
    }
    ring->buffers[id].length = (uint16_t)count;
    ring->buffers[id].offers++;
    ring->room -= count;
    return (int)id;
}

static void release(vdrv_packed *ring, uint16_t id)
{
    struct buffer *buffer = &ring->buffers[id];
    ring->room += buffer->length;
    if (--buffer->offers != 0 || !buffer->ours)
        return;
    buffer->ours = false;
    buffer->next = (uint16_t)ring->free_id;
    ring->free_id = id;
}

int vdrv_packed_write(vdrv_packed *ring, uint32_t slot, uint64_t iova, uint32_t len, uint16_t flags, uint16_t id)
{
    if (slot >= ring->size)
        return -EINVAL;
    struct packed_desc *desc = &ring->desc[slot];
    desc->addr = iova;
    desc->len = len;
    desc->id = id;
    atomic_store_explicit(&desc->flags, flags, memory_order_release);
    return 0;
}

/* The flags of the first descriptor that is not published are held back, so the device comes no further. */
void vdrv_packed_put(vdrv_packed *ring, uint64_t iova, uint32_t len, uint16_t flags, uint16_t id)
{
    struct packed_desc *desc = desc_at(ring, ring->avail);
    flags |= available_bits(ring, ring->avail);
    desc->addr = iova;
    desc->len = len;
    desc->id = id;
    if (ring->avail == ring->published)
        ring->held_flags = flags;
    else
        atomic_store_explicit(&desc->flags, flags, memory_order_relaxed);
    ring->avail = step(ring, ring->avail, 1);
}

static int add_indirect(vdrv_packed *ring, const struct vdrv_segment *segments, uint32_t count, uint64_t table_iova,
                        struct packed_desc *table)
{
    int id = vdrv_packed_reserve(ring, 1, VDRV_ANY_ID);
    if (id < 0)
        return id;
    for (uint32_t i = 0; i < count; i++) {
        table[i] = (struct packed_desc){.addr = segments[i].iova, .len = segments[i].len};
        atomic_init(&table[i].flags, segments[i].flags & VDRV_WRITE);
    }
    vdrv_packed_put(ring, table_iova, count * 16, VDRV_INDIRECT, (uint16_t)id);
    return id;
}

int vdrv_packed_add(vdrv_packed *ring, const struct vdrv_segment *segments, uint32_t count, uint64_t table_iova,
                    void *table)
{
    if (count == 0 || count > PACKED_MAX)
        return -EINVAL;
    if (table != NULL)
        return add_indirect(ring, segments, count, table_iova, table);
    int id = vdrv_packed_reserve(ring, count, VDRV_ANY_ID);
    for (uint32_t i = 0; id >= 0 && i < count; i++) {
        uint16_t flags = (uint16_t)((segments[i].flags & VDRV_WRITE) | (i + 1 < count ? VDRV_NEXT : 0));
        vdrv_packed_put(ring, segments[i].iova, segments[i].len, flags, (uint16_t)id);
    }
    return id;
}

void vdrv_packed_publish(vdrv_packed *ring)
{
    if (ring->published == ring->avail)
        return;
    atomic_store_explicit(&desc_at(ring, ring->published)->flags, ring->held_flags, memory_order_release);
    ring->published = ring->avail;
}

bool vdrv_packed_need_kick(vdrv_packed *ring)
{
    /* Between our store of the flags and our load of the device's wish; the device has the mirror image of this. */
    atomic_thread_fence(memory_order_seq_cst);
    uint32_t wish = atomic_load_explicit(ring->their_wish, memory_order_relaxed);
    uint32_t from = ring->judged, slot = wish & (EVENT_WRAP - 1);
    ring->judged = ring->published;
    if (from == ring->published || (wish >> 16 & 3) == EVENT_DISABLE)
        return false;
    if ((wish >> 16 & 3) != EVENT_DESC || !ring->event_idx || slot >= ring->size)
        return true;
    uint32_t event = wish & EVENT_WRAP ? slot : slot + ring->size;
    return slots_between(ring, from, event) < slots_between(ring, from, ring->published);
}

static bool is_used(vdrv_packed *ring)
{
    uint32_t expected = ring->used < ring->size ? FLAG_AVAIL | FLAG_USED : 0;
    uint16_t flags = atomic_load_explicit(&desc_at(ring, ring->used)->flags, memory_order_acquire);
    return (flags & (FLAG_AVAIL | FLAG_USED)) == expected;
}

int vdrv_packed_get_used(vdrv_packed *ring, struct vdrv_used *out, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++) {
        if (ring->used == ring->published || !is_used(ring))
            return (int)i;
        const volatile struct packed_desc *desc = desc_at(ring, ring->used);
        struct vdrv_used copy = {.id = desc->id, .len = desc->len};
        if (ring->buffers[copy.id].offers == 0)
            return i != 0 ? (int)i : -EPROTO;
        ring->used = step(ring, ring->used, ring->buffers[copy.id].length);
        release(ring, (uint16_t)copy.id);
        out[i] = copy;
    }
    return (int)count;
}

static void store_wish(vdrv_packed *ring, uint32_t flags, uint32_t position)
{
    uint32_t wrap = position < ring->size ? EVENT_WRAP : 0;
    atomic_store_explicit(ring->wish, flags << 16 | wrap | position % ring->size, memory_order_relaxed);
}

uint32_t vdrv_packed_arm(vdrv_packed *ring, uint16_t ahead)
{
    store_wish(ring, ring->event_idx ? EVENT_DESC : EVENT_ENABLE, step(ring, ring->used, ahead - 1u));
    atomic_thread_fence(memory_order_seq_cst);
    return ring->used != ring->published && is_used(ring);
}

void vdrv_packed_disarm(vdrv_packed *ring)
{
    store_wish(ring, EVENT_DISABLE, 0);
}

uint32_t vdrv_packed_avail(const vdrv_packed *ring)
{
    return ring->avail;
}

uint32_t vdrv_packed_used(const vdrv_packed *ring)
{
    return ring->used;
}

void vdrv_packed_set_wish(vdrv_packed *ring, uint32_t wish)
{
    atomic_store_explicit(ring->wish, wish, memory_order_seq_cst);
}

uint32_t vdrv_packed_their_wish(const vdrv_packed *ring)
{
    return atomic_load_explicit(ring->their_wish, memory_order_acquire);
}
