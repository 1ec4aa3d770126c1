/* Split rings, as the device sees them (VIRTIO 1.4, "Split Virtqueues"). */
#include "ring.h"

#include <errno.h>
#include <string.h>

#define AVAIL_F_NO_INTERRUPT 1
#define USED_F_NO_NOTIFY 1

static void split_lay_out(struct vmm_queue *q)
{
	const struct vmm_queue_config *c = &q->config;

	q->desc = (struct area){ .iova = c->desc, .len = 16ull * c->size, .align = 16, .prot = PROT_READ };
	q->driver = (struct area){ .iova = c->driver, .len = 6 + 2ull * c->size, .align = 2, .prot = PROT_READ };
	q->used = (struct area){ .iova = c->device, .len = 6 + 8ull * c->size, .align = 4, .prot = PROT_READ | PROT_WRITE };
}

static bool split_begin(struct vmm_queue *q)
{
	q->avail_idx = 0;
	return store16(q, &q->used, 0, 0);
}

/* The index is looked at again when what it showed has been taken; it cannot jump further than the ring is long. */
static int split_available(struct vmm_queue *q)
{
	if (q->avail_idx == q->next_avail && !load16(q, &q->driver, 2, &q->avail_idx))
		return -EPROTO;
	uint16_t n = (uint16_t)(q->avail_idx - q->next_avail);
	return n > q->config.size ? -EPROTO : n;
}

static bool read_desc(struct walk *w, uint32_t index, struct desc *d)
{
	void *p = at(w->q, &w->q->desc, 16ull * index, 16);

	if (p)
		copy_desc(d, p, false);
	return p;
}

static int split_walk(struct walk *w, uint16_t head)
{
	const struct vmm_queue_config *c = &w->q->config;
	uint32_t index = head, entries = c->size, direct = 0, seen = 0;
	bool indirect = false;
	uint64_t table = 0;
	struct desc d;

	do {
		/*
		 * A direct chain longer than the queue must loop, a table longer than it is read in bounds; what points
		 * at the table is no element, hence one more than the limit.
		 */
		if (index >= entries || seen++ > vmm_chain_limit(w->q) || (!indirect && direct++ >= c->size))
			return -EPROTO;
		if (indirect ? !vmm_chain_table_entry(w, table, index, &d) : !read_desc(w, index, &d))
			return -EPROTO;
		if (d.flags & DESC_F_INDIRECT) {
			if (!c->indirect || indirect || d.flags & DESC_F_NEXT || !d.len || d.len % 16)
				return -EPROTO;
			indirect = true;
			table = d.addr;
			entries = d.len / 16;
			index = 0;
			d.flags = DESC_F_NEXT;
			continue;
		}
		if (!vmm_chain_add(w, &d))
			return -EPROTO;
		index = d.link;
	} while (d.flags & DESC_F_NEXT);
	return 0;
}

static int split_take(struct walk *w)
{
	struct vmm_queue *q = w->q;
	uint16_t head;

	if (!load16(q, &q->driver, 4 + 2ull * (q->next_avail % q->config.size), &head))
		return -EPROTO;
	int error = split_walk(w, head);
	if (error)
		return error;
	w->slot->head = head;
	q->next_avail++;
	return 0;
}

static bool split_put_used(struct vmm_queue *q, const struct slot *s, uint32_t len)
{
	uint64_t offset = 4 + 8ull * (q->next_used % q->config.size);

	if (!store32(q, &q->used, offset, s->head) || !store32(q, &q->used, offset + 4, len))
		return false;
	q->next_used++;
	return true;
}

static bool split_publish(struct vmm_queue *q)
{
	return store16(q, &q->used, 2, q->next_used);
}

static uint32_t split_given_back(const struct vmm_queue *q, uint16_t old)
{
	return (uint16_t)(q->next_used - old);
}

static bool split_interrupt_due(struct vmm_queue *q, uint16_t old)
{
	uint16_t value;

	if (q->config.event_idx) {
		if (!load16(q, &q->driver, 4 + 2ull * q->config.size, &value))
			return true;
		return (uint16_t)(q->next_used - value - 1) < (uint16_t)(q->next_used - old);
	}
	return !load16(q, &q->driver, 0, &value) || !(value & AVAIL_F_NO_INTERRUPT);
}

/* With the event index, an avail event in the past is quiet by itself. */
static bool split_quiet(struct vmm_queue *q)
{
	return q->config.event_idx || store16(q, &q->used, 0, USED_F_NO_NOTIFY);
}

static bool split_arm(struct vmm_queue *q)
{
	if (q->config.event_idx)
		return store16(q, &q->used, 4 + 8ull * q->config.size, q->next_avail);
	return store16(q, &q->used, 0, 0);
}

static bool split_untouched(struct vmm_queue *q)
{
	static const uint8_t zero[16];
	const void *first = at(q, &q->desc, 0, sizeof(zero));
	uint16_t idx;

	return load16(q, &q->driver, 2, &idx) && !idx && first && !memcmp(first, zero, sizeof(zero));
}

const struct vmm_ring_format vmm_split_format = {
	.lay_out = split_lay_out, .begin = split_begin, .available = split_available, .take = split_take,
	.put_used = split_put_used, .publish = split_publish, .given_back = split_given_back,
	.interrupt_due = split_interrupt_due, .quiet = split_quiet, .arm = split_arm, .untouched = split_untouched,
};
