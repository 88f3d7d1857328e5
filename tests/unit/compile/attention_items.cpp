// Plans and items of attention on the host, for test_attention_items.py.
#include "attention_items.cuh"

using namespace tpserve::cuda;

extern "C" {
long plan_size(int tokens, int slots, int decode_only) { return PlanLayout(tokens, slots, decode_only != 0).size(); }

int decode_room(int tokens, int slots, int decode_only) {
  return PlanLayout(tokens, slots, decode_only != 0).max_decode;
}

int head_of(int place, int kv_head, int group, int num_kv_heads) {
  return head_at(place, kv_head, group, num_kv_heads);
}

int turn(int turn, int block, int num_blocks) { return item_of_turn(turn, block, num_blocks); }

long partial_rows(long tokens, long slots, long group) { return max_partial_rows(tokens, slots, group); }

/// (num_splits, 8) of a run: split, chunk, begin, end, first and last stage, whether it has the newest position, the first
/// stage of new positions.
int items_of(int count, int position, int window, int num_kv_heads, int* out) {
  Item item = decode_item(0, count, 0, position, window, num_kv_heads);
  for (int i = 0; i < item.num_splits; ++i, ++item.split, out += 8) {
    const Range range(item, window);
    out[0] = item.split, out[1] = item.chunk, out[2] = range.begin, out[3] = range.end;
    out[4] = range.first_stage(), out[5] = range.last_stage(), out[6] = range.has_newest(item);
    out[7] = range.first_new_stage(item);
  }
  return item.num_splits;
}

/// (items, 7) of a run that attends in pieces: token, tokens, begin, end, first and one behind the last place of sums that
/// the item's piece has, the first stage of new positions. Returns how many items, 0 if the run attends otherwise.
int piece_items_of(int count, int position, int group, int window, int num_kv_heads, int* out) {
  const Item run = decode_item(0, count, 0, position, window, num_kv_heads);
  const int pieces = decode_pieces(count, position, group);
  int number = 0;
  for (int piece = 0; piece < pieces; ++piece) {
    Item item = piece_item(run, piece, pieces, group, window, num_kv_heads);
    for (int i = 0; i < item.num_splits; ++i, ++item.split, ++number, out += 7) {
      const Range range(item, window);
      out[0] = item.token, out[1] = item.count, out[2] = range.begin, out[3] = range.end;
      out[4] = item.first_place, out[5] = item.first_place + item.num_splits;
      out[6] = range.first_new_stage(item);
    }
  }
  return number;
}
}
