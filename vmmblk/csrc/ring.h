/*
 * What the files of the device's side of a virtqueue share.  queue.c serves queues of either format: their life, slots,
 * popping and completing.  split.c and packed.c know how a format is laid out and signalled.  chain.c makes segments of
 * what descriptors name.  Everything here happens with the queue's lock held.
 */
#ifndef VMMBLK_RING_H
#define VMMBLK_RING_H

#include "core.h"

#include <endian.h>
#include <string.h>
#include <sys/mman.h>

#define DESC_F_NEXT 1
#define DESC_F_WRITE 2
#define DESC_F_INDIRECT 4

/* A private copy of a descriptor. */
struct desc {
	uint64_t addr;
	uint32_t len;
	uint16_t flags;
	uint16_t link;			/* next in a split ring, buffer id in a packed one */
};

/* Where the walk over one chain stands. */
struct walk {
	struct vmm_queue *q;
	struct slot *slot;
	struct vmm_chain *chain;
	bool writable;			/* a device-writable element was seen */
	uint64_t held_iova, held_len;	/* the last writable element: its last byte may be the status */
};

/* A format of rings.  Where an answer is bool, false is a ring that cannot be accessed. */
struct vmm_ring_format {
	/* Describe the three areas from the configuration. */
	void (*lay_out)(struct vmm_queue *q);
	/* Positions and wishes as they are at first. */
	bool (*begin)(struct vmm_queue *q);
	/* Whether a chain waits: more than 0, 0, or -EPROTO. */
	int (*available)(struct vmm_queue *q);
	/* Walk over the chain that waits, remember in its slot how it is given back, and go past it: 0 or -EPROTO. */
	int (*take)(struct walk *w);
	/* Give a chain back. */
	bool (*put_used)(struct vmm_queue *q, const struct slot *s, uint32_t len);
	/* Show the driver what was given back since the last time. */
	bool (*publish)(struct vmm_queue *q);
	/* How far it is from position old to where we are; not two rings' length. */
	uint32_t (*given_back)(const struct vmm_queue *q, uint16_t old);
	/* "Used Buffer Notification Suppression": is an interrupt due for that? */
	bool (*interrupt_due)(struct vmm_queue *q, uint16_t old);
	/* Say that doorbells are not needed, or that one is, for the next chain. */
	bool (*quiet)(struct vmm_queue *q);
	bool (*arm)(struct vmm_queue *q);
	/* Does the ring read as if no driver had ever written to it? */
	bool (*untouched)(struct vmm_queue *q);
};

extern const struct vmm_ring_format vmm_split_format, vmm_packed_format;

/* chain.c */
void vmm_chain_begin(struct vmm_chain *c);
uint32_t vmm_chain_limit(const struct vmm_queue *q);
bool vmm_chain_add(struct walk *w, const struct desc *d);
void vmm_chain_finish(struct walk *w);
bool vmm_chain_table_entry(struct walk *w, uint64_t table, uint32_t index, struct desc *d);
bool vmm_wraps(uint64_t iova, uint64_t len);

/* A descriptor is read once; the compiler must not go back to guest memory for a second look. */
static inline void copy_desc(struct desc *d, const void *from, bool packed)
{
	struct { uint64_t addr; uint32_t len; uint16_t tail[2]; } raw;

	memcpy(&raw, from, sizeof(raw));
	atomic_signal_fence(memory_order_seq_cst);
	*d = (struct desc){ le64toh(raw.addr), le32toh(raw.len), le16toh(raw.tail[packed]), le16toh(raw.tail[!packed]) };
}

/*
 * As vmm_region_find().  Most of what one chain names lies in the region where the last thing was, so that is looked at
 * first; a guess that is out of date finds another region or none, never a wrong one.
 */
static inline struct vmm_region *vmm_region_near(struct vmm_queue *q, uint64_t iova)
{
	struct vmm_memory *m = &q->device->memory;
	struct vmm_region *r = &m->regions[q->near];

	if (q->near < m->count && iova - r->iova < r->size)
		return r;
	r = vmm_region_find(m, iova);
	if (r)
		q->near = (uint32_t)(r - m->regions);
	return r;
}

/* The host address of len bytes at an offset in an area. */
static inline void *at(struct vmm_queue *q, const struct area *a, uint64_t offset, size_t len)
{
	if (a->host)
		return a->host + offset;
	return vmm_translate(&q->device->memory, a->iova + offset, len, PROT_READ);
}

static inline bool load16(struct vmm_queue *q, const struct area *a, uint64_t offset, uint16_t *value)
{
	_Atomic(uint16_t) *p = at(q, a, offset, 2);

	if (!p)
		return false;
	*value = le16toh(atomic_load_explicit(p, memory_order_acquire));
	return true;
}

static inline bool store16(struct vmm_queue *q, const struct area *a, uint64_t offset, uint16_t value)
{
	_Atomic(uint16_t) *p = at(q, a, offset, 2);

	if (!p)
		return false;
	atomic_store_explicit(p, htole16(value), memory_order_release);
	return true;
}

static inline bool load32(struct vmm_queue *q, const struct area *a, uint64_t offset, uint32_t *value)
{
	_Atomic(uint32_t) *p = at(q, a, offset, 4);

	if (!p)
		return false;
	*value = le32toh(atomic_load_explicit(p, memory_order_acquire));
	return true;
}

static inline bool store32(struct vmm_queue *q, const struct area *a, uint64_t offset, uint32_t value)
{
	_Atomic(uint32_t) *p = at(q, a, offset, 4);

	if (!p)
		return false;
	atomic_store_explicit(p, htole32(value), memory_order_relaxed);
	return true;
}

#endif
