// What the threads of push.cu and of GEMMs that push do to the buffers of push_places.cuh, one after the other on the host,
// for test_push_places.py. A place holds 0 while it is free, else a number that tells who wrote it.
#include "push_stage.cuh"

using namespace tpserve::cuda;

namespace {

/// A rank's buffers.
struct Memory {
  int32_t *one_shot, *two_shot, *reduced, *scales;
};

int put(int32_t* memory, size_t place, int tag) {
  const int was_taken = memory[place] != 0;
  memory[place] = tag;
  return was_taken;
}

unsigned threads_of(unsigned vectors) { return 8 * (((vectors + 7) / 8 + 31) / 32 * 32); }  // launch_rows()

template <int kRanks>
void release(const Places& places, const Memory& m, bool one_shot, int rank, unsigned buffer, Used used, Worker w) {
  const auto clear = [](int32_t* memory) { return [memory](size_t place) { memory[place] = 0; }; };
  if (one_shot) {
    free_one_shot<kRanks>(places, buffer, used, w, clear(m.one_shot));
  } else {
    free_two_shot<kRanks>(places, rank, buffer, used, w, clear(m.two_shot), clear(m.reduced), clear(m.scales));
  }
}

}  // namespace

extern "C" {
/// Where a stage has a channel of a token, in bytes.
int stage_place(int token, int channel) { return staged_at(token, channel); }

/// Sends a rank's rows as its GEMM does, tile by tile; returns how many places were not free.
int push(int num_ranks, int row_vectors, Memory* ranks, int one_shot, int rank, int buffer, int rows, int vectors, int tag) {
  const Places places{num_ranks, row_vectors};
  const PushRows push_rows = PushRows::of(places, one_shot, rank);
  int taken = 0;
  for (int first = 0; first < vectors; first += TileSender::kVectors) {
    for (int thread = 0; thread < kStageThreads; ++thread) {
      const TileSender sender(thread);
      if (first + sender.vector >= vectors) continue;
      for (int row = sender.token; row < rows; row += TileSender::kStep) {
        sender.send(push_rows, buffer, first, row, [&](int holder, unsigned place) {
          taken += put(one_shot ? ranks[holder].one_shot : ranks[holder].two_shot, place, tag);
        });
      }
    }
  }
  return taken;
}

/// Sizes of a rank's buffers, in the order of `Memory`.
void sizes(int num_ranks, int row_vectors, int64_t* out) {
  const Places places{num_ranks, row_vectors};
  out[0] = places.one_shot(kBuffers, 0, 0), out[1] = places.two_shot(kBuffers, 0, 0);
  out[2] = places.reduced(kBuffers, 0), out[3] = places.scale(kBuffers, 0);
}

/// Sends a rank's rows; returns how many places were not free.
int send(int num_ranks, int row_vectors, Memory* ranks, int one_shot, int rank, int buffer, int rows, int vectors, int tag) {
  const Places places{num_ranks, row_vectors};
  int taken = 0;
  for (int row = 0; row < rows; ++row) {
    for (int peer = 0; peer < num_ranks; ++peer) {
      if (peer == rank || (!one_shot && row % num_ranks != peer)) continue;
      for (int v = 0; v < vectors; ++v) {
        taken += one_shot ? put(ranks[peer].one_shot, places.one_shot(buffer, rank, row) + v, tag)
                          : put(ranks[peer].two_shot, places.two_shot(buffer, rank, row) + v, tag);
      }
    }
  }
  return taken;
}

/// Sends what a rank has reduced in a two-shot call; returns how many places were not free.
int send_reduced(int num_ranks, int row_vectors, Memory* ranks, int rank, int buffer, int rows, int vectors, int tag) {
  const Places places{num_ranks, row_vectors};
  int taken = 0;
  for (int row = rank; row < rows; row += num_ranks) {
    for (int peer = 0; peer < num_ranks; ++peer) {
      if (peer == rank) continue;
      for (int v = 0; v < vectors; ++v) taken += put(ranks[peer].reduced, places.reduced(buffer, row) + v, tag);
      taken += put(ranks[peer].scales, places.scale(buffer, row), tag);
    }
  }
  return taken;
}

/// Frees what the call before used, with all threads of a call of `rows` rows of `vectors`.
void free_before(int num_ranks, int row_vectors, const Memory* m, int one_shot, int rank, int buffer, int used_rows,
                 int used_vectors, int rows, int vectors) {
  const Places places{num_ranks, row_vectors};
  const Used used{static_cast<unsigned>(used_rows), static_cast<unsigned>(used_vectors)};
  const unsigned threads = threads_of(vectors);
  for (unsigned row = 0; row < static_cast<unsigned>(rows); ++row) {
    for (unsigned v = 0; v < threads; ++v) {
      const Worker w{row, static_cast<unsigned>(rows), v, threads};
      if (num_ranks == 2) release<2>(places, *m, one_shot, rank, buffer, used, w);
      if (num_ranks == 4) release<4>(places, *m, one_shot, rank, buffer, used, w);
      if (num_ranks == 8) release<8>(places, *m, one_shot, rank, buffer, used, w);
    }
  }
}

/// How many places do not hold what a call must have brought a rank; `tags` by source.
int missing(int num_ranks, int row_vectors, const Memory* m, int one_shot, int pushed, int rank, int buffer, int rows,
            int vectors, int reduced, const int* tags) {
  const Places places{num_ranks, row_vectors};
  int wrong = 0;
  for (int row = 0; row < rows; ++row) {
    const int owner = row % num_ranks;
    if (reduced) {
      if (owner == rank) continue;
      for (int v = 0; v < vectors; ++v) wrong += m->reduced[places.reduced(buffer, row) + v] != tags[owner];
      wrong += m->scales[places.scale(buffer, row)] != tags[owner];
      continue;
    }
    if (!one_shot && owner != rank) continue;
    for (int source = 0; source < num_ranks; ++source) {
      if (source == rank && !pushed) continue;
      for (int v = 0; v < vectors; ++v) {
        const int32_t found = one_shot ? m->one_shot[places.one_shot(buffer, source, row) + v]
                                       : m->two_shot[places.two_shot(buffer, source, row) + v];
        wrong += found != tags[source];
      }
    }
  }
  return wrong;
}

/// How many places of one buffer are not free.
int taken(int num_ranks, int row_vectors, const Memory* m, int one_shot, int buffer) {
  const Places places{num_ranks, row_vectors};
  int count = 0;
  const auto look = [&](const int32_t* memory, size_t begin, size_t end) {
    for (size_t i = begin; i < end; ++i) count += memory[i] != 0;
  };
  if (one_shot) {
    look(m->one_shot, places.one_shot(buffer, 0, 0), places.one_shot(buffer + 1, 0, 0));
  } else {
    look(m->two_shot, places.two_shot(buffer, 0, 0), places.two_shot(buffer + 1, 0, 0));
    look(m->reduced, places.reduced(buffer, 0), places.reduced(buffer + 1, 0));
    look(m->scales, places.scale(buffer, 0), places.scale(buffer + 1, 0));
  }
  return count;
}
}
