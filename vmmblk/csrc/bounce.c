/*
 * Private memory for data that the kernel shall not reach in guest memory, or cannot where it lies: a request goes
 * through it piece by piece.  Guest memory is touched by the thread alone, while the chain is in flight; so a transfer
 * that ends late ends in here.
 *
 * A thread has a pool of a few MiB.  Those that find none of it free wait, in their order; somebody who has some is in
 * the hands of the kernel then, and gives it back.
 */
#include "transfer.h"

#include <string.h>
#include <sys/mman.h>

#define UNIT (64u << 10)
#define PIECE_UNITS 16			/* of one piece, at most */
#define ALL_UNITS 128			/* of all threads together, but each has MIN_UNITS */
#define MIN_UNITS 16
#define MAX_UNITS 64

size_t pool_size(const struct pool *p)
{
	return (size_t)p->units * UNIT;
}

/* A pool for one of so many threads.  Its pages take memory once they are used, or registered. */
bool pool_make(struct pool *p, uint32_t threads)
{
	uint32_t units = ALL_UNITS / threads;

	p->units = units > MAX_UNITS ? MAX_UNITS : units < MIN_UNITS ? MIN_UNITS : units;
	p->end = &p->first;
	p->memory = mmap(NULL, pool_size(p), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (p->memory == MAP_FAILED)
		p->memory = NULL;
	return p->memory;
}

void pool_free(struct pool *p)
{
	if (p->memory)
		munmap(p->memory, pool_size(p));
	p->memory = NULL;
}

static uint64_t mask_of(uint32_t unit, uint32_t units)
{
	return ((1ull << units) - 1) << unit;
}

static bool take_units(struct pool *p, struct op *op, uint32_t units)
{
	for (uint32_t unit = 0; unit + units <= p->units; unit++) {
		if (p->taken & mask_of(unit, units))
			continue;
		p->taken |= mask_of(unit, units);
		op->unit = unit;
		op->units = units;
		op->room = units * UNIT;
		op->buffer = p->memory + (size_t)unit * UNIT;
		return true;
	}
	return false;
}

/* Memory for a piece of what is left, or as much as there is; false if there is none. */
bool pool_take(struct pool *p, struct op *op)
{
	uint64_t want = (op->left + UNIT - 1) / UNIT;

	for (uint32_t units = want > PIECE_UNITS ? PIECE_UNITS : (uint32_t)want; units; units /= 2)
		if (take_units(p, op, units))
			return true;
	return false;
}

void pool_give(struct pool *p, struct op *op)
{
	if (op->buffer)
		p->taken &= ~mask_of(op->unit, op->units);
	op->buffer = NULL;
}

void pool_wait(struct pool *p, struct op *op)
{
	op->next = NULL;
	*p->end = op;
	p->end = &op->next;
}

/* Who has waited longest, with memory; NULL if nobody waits or there is none. */
struct op *pool_next(struct pool *p)
{
	struct op *op = p->first;

	if (!op || !pool_take(p, op))
		return NULL;
	p->first = op->next;
	if (!p->first)
		p->end = &p->first;
	return op;
}

/* Copy so many bytes of the chain's data, from where the last copy ended. */
static void copy_on(struct op *op, uint8_t *buffer, size_t len)
{
	uint32_t n;
	const struct vmm_seg *s = segments(&op->chain, op->type == TYPE_OUT, &n);

	while (len) {
		size_t part = s[op->seg].len - op->seg_done < len ? s[op->seg].len - op->seg_done : len;
		uint8_t *at = s[op->seg].host + op->seg_done;
		if (op->type == TYPE_OUT)
			memcpy(buffer, at, part);
		else
			memcpy(at, buffer, part);
		buffer += part;
		len -= part;
		op->seg_done += (uint32_t)part;
		if (op->seg_done == s[op->seg].len) {
			op->seg++;
			op->seg_done = 0;
		}
	}
}

void bounce_begin(struct op *op, uint64_t length)
{
	op->left = length;
	op->seg = op->seg_done = 0;
	op->nr_iov = 0;
}

/* The piece in the buffer is done: make the next one ready; false if it was the last. */
bool bounce_next(struct op *op)
{
	if (op->nr_iov && op->type == TYPE_IN)
		copy_on(op, op->buffer, op->piece);
	if (!op->left)
		return false;
	op->piece = op->left < op->room ? (uint32_t)op->left : op->room;
	op->left -= op->piece;
	if (op->type == TYPE_OUT)
		copy_on(op, op->buffer, op->piece);
	op->iov[0] = (struct iovec){ op->buffer, op->piece };
	op->nr_iov = 1;
	op->first = 0;
	return true;
}
