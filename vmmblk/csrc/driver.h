/* The driver's half of a virtqueue, for the client that drives a device without a guest.
 *
 * The caller owns the ring memory and keeps it mapped for the life of the ring object.  The device is not trusted:
 * what it writes is bounded before use, and the descriptor table is never read back.  One thread per ring.
 */
#ifndef VMMBLK_DRIVER_H
#define VMMBLK_DRIVER_H

#include <stdbool.h>
#include <stdint.h>

enum {
    VDRV_NEXT = 1,
    VDRV_WRITE = 2,
    VDRV_INDIRECT = 4,
};

/* One element of a chain to be: flags is VDRV_WRITE or 0; NEXT and INDIRECT are the ring's business. */
struct vdrv_segment {
    uint64_t iova;
    uint32_t len;
    uint16_t flags;
};

struct vdrv_used {
    uint32_t id;
    uint32_t len;
};

typedef struct vdrv_split vdrv_split;

/* A split ring over host addresses of its three areas, which are zeroed.  NULL with errno EINVAL (size not a power of
 * two from 1 to 32768, misaligned area) or ENOMEM. */
vdrv_split *vdrv_split_new(void *desc, void *avail, void *used, uint32_t size, bool event_idx);
void vdrv_split_free(vdrv_split *ring);

/* Descriptors not in use. */
uint32_t vdrv_split_room(const vdrv_split *ring);

/* Build a chain and put its head in the next avail slot; the device sees it after publish.  With table != NULL the
 * chain goes into that indirect table (count * 16 bytes at table, table_iova for the device).  Returns the head, or
 * -EINVAL (no segment, or more than 32768), or -ENOSPC. */
int vdrv_split_add(vdrv_split *ring, const struct vdrv_segment *segments, uint32_t count, uint64_t table_iova,
                   void *table);

/* The parts of add, for chains that break the rules.  reserve takes count descriptors and names them; write stores
 * one literally; offer puts any number in the next avail slot.  A reserved chain is released when the device returns
 * its first slot as often as that was offered. */
int vdrv_split_reserve(vdrv_split *ring, uint32_t count, uint16_t *slots);
int vdrv_split_write(vdrv_split *ring, uint32_t slot, uint64_t iova, uint32_t len, uint16_t flags, uint16_t next);
void vdrv_split_offer(vdrv_split *ring, uint16_t head);

/* Make everything offered visible to the device. */
void vdrv_split_publish(vdrv_split *ring);

/* Whether the device asked to be notified of what was published since the last call (used.flags or avail_event). */
bool vdrv_split_need_kick(vdrv_split *ring);

/* Pop up to count used elements.  Returns their number, or -EPROTO when the next one is nothing the device may
 * return: an id that is not in flight, or an index more than a ring ahead. */
int vdrv_split_get_used(vdrv_split *ring, struct vdrv_used *out, uint32_t count);

/* Ask for an interrupt once `ahead` more elements are used (1: the next one; without event index every one).
 * Returns how many are waiting already: an interrupt for those may never come. */
uint32_t vdrv_split_arm(vdrv_split *ring, uint16_t ahead);

/* Ask for no interrupts; a hint, and with event index one that expires after 65535 elements. */
void vdrv_split_disarm(vdrv_split *ring);

/* Raw access, right or wrong. */
uint16_t vdrv_split_avail_idx(const vdrv_split *ring);
void vdrv_split_set_avail_idx(vdrv_split *ring, uint16_t idx);
uint16_t vdrv_split_used_idx(const vdrv_split *ring);
void vdrv_split_set_avail_flags(vdrv_split *ring, uint16_t flags);
void vdrv_split_set_used_event(vdrv_split *ring, uint16_t event);
uint16_t vdrv_split_used_flags(const vdrv_split *ring);
uint16_t vdrv_split_avail_event(const vdrv_split *ring);

/* A packed ring with the same face.  driver and device are the event suppression structures.  NULL with errno EINVAL
 * (size not from 1 to 32768, misaligned area) or ENOMEM. */
typedef struct vdrv_packed vdrv_packed;

vdrv_packed *vdrv_packed_new(void *desc, void *driver, void *device, uint32_t size, bool event_idx);
void vdrv_packed_free(vdrv_packed *ring);

/* Slots not in use. */
uint32_t vdrv_packed_room(const vdrv_packed *ring);

/* As vdrv_split_add; returns the buffer id. */
int vdrv_packed_add(vdrv_packed *ring, const struct vdrv_segment *segments, uint32_t count, uint64_t table_iova,
                    void *table);

/* The parts of add, for lists that break the rules.  reserve accounts for a list of count descriptors that the device
 * is to return under an id: any below 65536, or VDRV_ANY_ID for a free one; returns the id, or -EINVAL, or -ENOSPC.
 * put stores one in the next slot, made available.  write stores one literally in any slot, at once. */
#define VDRV_ANY_ID UINT32_MAX
int vdrv_packed_reserve(vdrv_packed *ring, uint32_t count, uint32_t id);
void vdrv_packed_put(vdrv_packed *ring, uint64_t iova, uint32_t len, uint16_t flags, uint16_t id);
int vdrv_packed_write(vdrv_packed *ring, uint32_t slot, uint64_t iova, uint32_t len, uint16_t flags, uint16_t id);

/* As for a split ring; arm counts `ahead` in slots, and says only whether something is waiting. */
void vdrv_packed_publish(vdrv_packed *ring);
bool vdrv_packed_need_kick(vdrv_packed *ring);
int vdrv_packed_get_used(vdrv_packed *ring, struct vdrv_used *out, uint32_t count);
uint32_t vdrv_packed_arm(vdrv_packed *ring, uint16_t ahead);
void vdrv_packed_disarm(vdrv_packed *ring);

/* Raw access, right or wrong: positions (from 0 to twice the size), and the event suppression structures as one
 * number, the flags in its high half. */
uint32_t vdrv_packed_avail(const vdrv_packed *ring);
uint32_t vdrv_packed_used(const vdrv_packed *ring);
void vdrv_packed_set_wish(vdrv_packed *ring, uint32_t wish);
uint32_t vdrv_packed_their_wish(const vdrv_packed *ring);

#endif
