/*
 * Packed rings, as the device sees them (VIRTIO 1.4, "Packed Virtqueues").
 *
 * A position counts from 0 to twice the queue size, so it tells both the ring slot and the wrap counter, which is 1 on
 * the first lap.  Available and used position are never further apart than the queue is long: a chain is given back as
 * many slots long as it was taken.
 */
#include "ring.h"

#include <errno.h>
#include <string.h>

#define DESC_F_AVAIL (1 << 7)
#define DESC_F_USED (1 << 15)

#define EVENT_F_ENABLE 0u	/* le16 offset and wrap counter, le16 flags: read and written as one */
#define EVENT_F_DISABLE 1u
#define EVENT_F_DESC 2u
#define EVENT_FLAGS(event) ((event) >> 16 & 3)
#define EVENT(flags, position) ((flags) << 16 | (position))
#define EVENT_WRAP 0x8000u

static uint32_t laps(const struct vmm_queue *q)
{
	return 2 * q->config.size;
}

/* From one position to another, forwards. */
static uint32_t distance(const struct vmm_queue *q, uint32_t from, uint32_t to)
{
	return to >= from ? to - from : to + laps(q) - from;
}

static uint16_t further(const struct vmm_queue *q, uint32_t position, uint32_t slots)
{
	position += slots;
	return (uint16_t)(position < laps(q) ? position : position - laps(q));
}

static bool wrap_counter(const struct vmm_queue *q, uint32_t position)
{
	return position < q->config.size;
}

static uint64_t slot_offset(const struct vmm_queue *q, uint32_t position)
{
	return 16ull * (wrap_counter(q, position) ? position : position - q->config.size);
}

static void packed_lay_out(struct vmm_queue *q)
{
	const struct vmm_queue_config *c = &q->config;

	q->desc = (struct area){ .iova = c->desc, .len = 16ull * c->size, .align = 16, .prot = PROT_READ | PROT_WRITE };
	q->driver = (struct area){ .iova = c->driver, .len = 4, .align = 4, .prot = PROT_READ };
	q->used = (struct area){ .iova = c->device, .len = 4, .align = 4, .prot = PROT_READ | PROT_WRITE };
}

static bool packed_begin(struct vmm_queue *q)
{
	return store32(q, &q->used, 0, EVENT(EVENT_F_ENABLE, 0));
}

/* What was available stays so until it was used, so a slot's flags decide before anything else of it is read. */
static bool load_flags(struct vmm_queue *q, uint16_t position, uint16_t *flags)
{
	return load16(q, &q->desc, slot_offset(q, position) + 14, flags);
}

static bool is_available(const struct vmm_queue *q, uint16_t position, uint16_t flags)
{
	uint16_t expected = wrap_counter(q, position) ? DESC_F_AVAIL : DESC_F_USED;

	return (flags & (DESC_F_AVAIL | DESC_F_USED)) == expected;
}

static int packed_available(struct vmm_queue *q)
{
	uint16_t flags;

	return load_flags(q, q->next_avail, &flags) ? is_available(q, q->next_avail, flags) : -EPROTO;
}

static bool packed_read(struct walk *w, uint16_t position, struct desc *d)
{
	const void *p = at(w->q, &w->q->desc, slot_offset(w->q, position), 16);
	uint16_t flags;

	if (!p || !load_flags(w->q, position, &flags) || !is_available(w->q, position, flags))
		return false;
	copy_desc(d, p, true);
	d->flags = flags;	/* as they were when they were checked */
	return true;
}

/* Every entry of the table is an element, and of its flags only WRITE counts. */
static int packed_table(struct walk *w, const struct desc *d)
{
	uint32_t entries = d->len / 16;
	struct desc entry;

	if (!w->q->config.indirect || d->flags & DESC_F_NEXT || !d->len || d->len % 16 || entries > vmm_chain_limit(w->q))
		return -EPROTO;
	for (uint32_t i = 0; i < entries; i++)
		if (!vmm_chain_table_entry(w, d->addr, i, &entry) || !vmm_chain_add(w, &entry))
			return -EPROTO;
	return 0;
}

/* A list of plain descriptors, or one that points at a table.  It cannot be longer than what the driver may fill. */
static int packed_take(struct walk *w)
{
	struct vmm_queue *q = w->q;
	uint32_t room = q->config.size - distance(q, q->next_used, q->next_avail), slots = 0;
	struct desc d;

	do {
		if (slots == room || !packed_read(w, further(q, q->next_avail, slots), &d))
			return -EPROTO;
		if (d.flags & DESC_F_INDIRECT ? slots || packed_table(w, &d) : !vmm_chain_add(w, &d))
			return -EPROTO;
		slots++;
	} while (d.flags & DESC_F_NEXT);
	w->slot->head = d.link;
	w->slot->ring_slots = (uint16_t)slots;
	q->next_avail = further(q, q->next_avail, slots);
	return 0;
}

/* The flags come last: with them the driver sees the rest. */
static bool packed_put_used(struct vmm_queue *q, const struct slot *s, uint32_t len)
{
	uint64_t offset = slot_offset(q, q->next_used);
	uint16_t flags = wrap_counter(q, q->next_used) ? DESC_F_AVAIL | DESC_F_USED : 0;

	if (!store32(q, &q->desc, offset + 8, len) || !store16(q, &q->desc, offset + 12, s->head) ||
	    !store16(q, &q->desc, offset + 14, len ? flags | DESC_F_WRITE : flags))
		return false;
	q->next_used = further(q, q->next_used, s->ring_slots);
	return true;
}

static bool packed_publish(struct vmm_queue *q)
{
	(void)q;
	return true;
}

static uint32_t packed_given_back(const struct vmm_queue *q, uint16_t old)
{
	return distance(q, old, q->next_used);
}

/* An event the driver may not ask for counts as "enable": an interrupt too many, never one too few. */
static bool packed_interrupt_due(struct vmm_queue *q, uint16_t old)
{
	uint32_t event;

	if (!load32(q, &q->driver, 0, &event))
		return true;
	if (EVENT_FLAGS(event) == EVENT_F_DISABLE)
		return false;
	uint32_t slot = event & (EVENT_WRAP - 1);
	if (EVENT_FLAGS(event) != EVENT_F_DESC || !q->config.event_idx || slot >= q->config.size)
		return true;
	uint32_t position = event & EVENT_WRAP ? slot : slot + q->config.size;
	return distance(q, old, position) < distance(q, old, q->next_used);
}

static bool packed_quiet(struct vmm_queue *q)
{
	return store32(q, &q->used, 0, EVENT(EVENT_F_DISABLE, 0));
}

static bool packed_arm(struct vmm_queue *q)
{
	uint32_t slot = (uint32_t)(slot_offset(q, q->next_avail) / 16);

	if (!q->config.event_idx)
		return store32(q, &q->used, 0, EVENT(EVENT_F_ENABLE, 0));
	return store32(q, &q->used, 0, EVENT(EVENT_F_DESC, slot | (wrap_counter(q, q->next_avail) ? EVENT_WRAP : 0)));
}

static bool packed_untouched(struct vmm_queue *q)
{
	static const uint8_t zero[16];
	const void *first = at(q, &q->desc, 0, sizeof(zero));

	return first && !memcmp(first, zero, sizeof(zero));
}

const struct vmm_ring_format vmm_packed_format = {
	.lay_out = packed_lay_out, .begin = packed_begin, .available = packed_available, .take = packed_take,
	.put_used = packed_put_used, .publish = packed_publish, .given_back = packed_given_back,
	.interrupt_due = packed_interrupt_due, .quiet = packed_quiet, .arm = packed_arm, .untouched = packed_untouched,
};
