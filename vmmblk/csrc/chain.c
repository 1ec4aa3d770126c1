/*
 * What descriptors name, translated into segments, for either format of ring.
 *
 * How header, data and status are laid over descriptors is not assumed: the first 16 readable bytes are the header,
 * the last writable byte is the status, what lies between is data.
 */
#include "ring.h"

#include <endian.h>
#include <stdlib.h>
#include <string.h>

#define SECTOR 512
#define TYPE_IN 0
#define TYPE_OUT 1

bool vmm_wraps(uint64_t iova, uint64_t len)
{
	return len && len - 1 > UINT64_MAX - iova;
}

static bool grow_segs(struct slot *s, uint32_t limit)
{
	uint32_t want = s->max_segs ? s->max_segs * 2 : 8;

	if (s->nr_segs >= limit)
		return false;
	if (want > limit)
		want = limit;
	struct vmm_seg *segs = realloc(s->segs, want * sizeof(*segs));
	if (!segs)
		return false;
	s->segs = segs;
	s->max_segs = want;
	return true;
}

/* How many elements a chain may have: memory and time are bounded. */
uint32_t vmm_chain_limit(const struct vmm_queue *q)
{
	return q->config.size > VMM_CHAIN_MIN_LIMIT ? q->config.size : VMM_CHAIN_MIN_LIMIT;
}

static void unreachable(struct walk *w, const struct vmm_region *r)
{
	w->chain->flags |= VMM_CHAIN_UNREACHABLE;
	if (r && !r->addr)
		w->chain->flags |= VMM_CHAIN_NO_FD;
}

static bool add_piece(struct walk *w, const struct vmm_region *r, uint64_t offset, uint32_t len, bool joins)
{
	struct slot *s = w->slot;

	if (joins && s->nr_segs) {	/* neighbours in the same alias are one segment */
		struct vmm_seg *last = &s->segs[s->nr_segs - 1];
		if (last->alias == r->alias && last->offset + last->len == offset && last->len + (uint64_t)len <= UINT32_MAX) {
			last->len += len;
			return true;
		}
	}
	if (s->nr_segs == s->max_segs && !grow_segs(s, vmm_chain_limit(w->q) + VMM_SEGS_SLACK)) {
		unreachable(w, NULL);
		return false;
	}
	s->segs[s->nr_segs++] = (struct vmm_seg){
		.alias = r->alias, .len = len, .offset = offset, .host = r->addr + offset,
	};
	return true;
}

/* Add [iova, iova + len) to the data, over however many regions it lies. */
static void add_data(struct walk *w, uint64_t iova, uint64_t len, bool write)
{
	uint32_t prot = write ? PROT_WRITE : PROT_READ;
	uint64_t *total = write ? &w->chain->writable : &w->chain->readable;
	bool joins = write ? w->chain->writable > 0 : w->chain->readable > 0;

	*total += len;
	if (w->chain->flags & VMM_CHAIN_UNREACHABLE)
		return;		/* nobody will look at the data, and a walk over many regions takes long */
	while (len) {
		struct vmm_region *r = vmm_region_near(w->q, iova);
		if (!r || !r->addr || (r->prot & prot) != prot) {
			unreachable(w, r);
			return;
		}
		uint64_t offset = iova - r->iova;
		uint64_t part = r->size - offset < len ? r->size - offset : len;
		if (!add_piece(w, r, offset, (uint32_t)part, joins))
			return;
		joins = true;
		iova += part;
		len -= part;
	}
}

static void copy_header(struct walk *w, uint64_t iova, uint64_t len)
{
	uint8_t *to = w->chain->header + w->chain->header_len;

	w->chain->header_len += (uint32_t)len;	/* what cannot be reached stays zero */
	while (len) {
		struct vmm_region *r = vmm_region_near(w->q, iova);
		if (!r || !r->addr || !(r->prot & PROT_READ)) {
			unreachable(w, r);
			return;
		}
		uint64_t left = r->size - (iova - r->iova);
		uint64_t part = left < len ? left : len;
		memcpy(to, r->addr + (iova - r->iova), part);
		to += part;
		iova += part;
		len -= part;
	}
}

static void add_readable(struct walk *w, uint64_t iova, uint32_t len)
{
	uint64_t head = VMM_HEADER_SIZE - w->chain->header_len;

	if (head > len)
		head = len;
	copy_header(w, iova, head);
	if (len > head)
		add_data(w, iova + head, len - head, false);
}

static void add_writable(struct walk *w, uint64_t iova, uint32_t len)
{
	if (!w->writable) {
		w->chain->readable_segs = w->slot->nr_segs;
		w->writable = true;
	}
	if (!len)
		return;
	if (w->held_len)
		add_data(w, w->held_iova, w->held_len, true);
	w->held_iova = iova;
	w->held_len = len;
}

/* Field by field: that is several times as fast as to zero it whole, and first is told when there is one. */
void vmm_chain_begin(struct vmm_chain *c)
{
	c->flags = c->error = c->header_len = 0;
	memset(c->header, 0, sizeof(c->header));
	c->readable_segs = c->writable_segs = 0;
	c->readable = c->writable = 0;
}

/* The last writable byte is the status; what comes before it in its element is data. */
void vmm_chain_finish(struct walk *w)
{
	struct vmm_chain *c = w->chain;
	struct slot *s = w->slot;

	if (!w->writable)
		c->readable_segs = s->nr_segs;
	s->has_status = false;
	if (w->held_len) {
		s->status_iova = w->held_iova + w->held_len - 1;
		if (w->held_len > 1)
			add_data(w, w->held_iova, w->held_len - 1, true);
		s->has_status = !vmm_wraps(w->held_iova, w->held_len) && vmm_region_reach(vmm_region_near(w->q, s->status_iova), s->status_iova, 1, PROT_WRITE);
		if (!s->has_status)
			unreachable(w, vmm_region_near(w->q, s->status_iova));
	}
	if (!s->has_status)
		c->flags |= VMM_CHAIN_NO_STATUS;
	if (c->readable > UINT32_MAX || c->writable >= UINT32_MAX)
		unreachable(w, NULL);	/* more than a used length can tell */
	s->readable_segs = c->readable_segs;
	s->writable = c->writable;
	c->writable_segs = s->nr_segs - c->readable_segs;
	c->segs = s->segs;
	if (s->nr_segs)
		c->first = s->segs[0];
}

/* An element.  False: a readable one after a writable one. */
bool vmm_chain_add(struct walk *w, const struct desc *d)
{
	if (vmm_wraps(d->addr, d->len))
		unreachable(w, NULL);
	if (d->flags & DESC_F_WRITE)
		add_writable(w, d->addr, d->len);
	else if (w->writable)
		return false;
	else
		add_readable(w, d->addr, d->len);
	return true;
}

/* Copy an entry of an indirect table; its length and alignment are the driver's. */
bool vmm_chain_table_entry(struct walk *w, uint64_t table, uint32_t index, struct desc *d)
{
	uint64_t offset = 16ull * index;
	uint64_t at = table + offset;
	void *p = at < table ? NULL : vmm_region_reach(vmm_region_near(w->q, at), at, 16, PROT_READ);

	if (!p)
		return false;
	copy_desc(d, p, w->q->config.packed);
	return true;
}

static bool within(const struct vmm_terms *t, uint64_t sector, const struct vmm_seg *data)
{
	uint32_t scale = t->sector_size / SECTOR;
	uint64_t first = sector / scale, length = data->len / t->sector_size;

	return !(sector % scale) && !(data->len % t->sector_size) && first <= t->sectors && length <= t->sectors - first &&
	       !(((uintptr_t)data->host | data->len) & (t->alignment - 1));
}

static struct vmm_plain plain(const struct vmm_chain *c, const struct vmm_terms *t)
{
	const struct vmm_seg *data = &c->first;
	bool write = c->readable_segs;
	uint32_t type;
	uint64_t sector;

	memcpy(&type, c->header, sizeof(type));
	memcpy(&sector, c->header + 8, sizeof(sector));
	type = le32toh(type);
	sector = le64toh(sector);
	if (c->flags || c->error || c->header_len != VMM_HEADER_SIZE || c->readable_segs + c->writable_segs != 1 ||
	    type != (write ? TYPE_OUT : TYPE_IN) || (write && !t->writable) || !within(t, sector, data))
		return (struct vmm_plain){ .token = c->token, .kind = VMM_NOT_PLAIN };
	return (struct vmm_plain){
		.token = c->token, .kind = write ? VMM_PLAIN_WRITE : VMM_PLAIN_READ, .alias = data->alias,
		.written = (uint32_t)c->writable, .sector = sector / (t->sector_size / SECTOR),
		.start = data->offset, .end = data->offset + data->len,
	};
}

/*
 * Look for the commonest requests, those that need no second look: one answer for each chain, how many are plain, and
 * how these end if all goes well.
 */
int vmm_chains_plain(const struct vmm_chain *chains, int n, const struct vmm_terms *terms, struct vmm_plain *out,
		     struct vmm_completion *good)
{
	int found = 0;

	for (int i = 0; i < n; i++) {
		out[i] = plain(&chains[i], terms);
		if (out[i].kind != VMM_NOT_PLAIN)
			good[found++] = (struct vmm_completion){ .token = out[i].token, .written = out[i].written };
	}
	return found;
}
