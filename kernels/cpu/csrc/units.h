// Units of attention over threads: a unit is some rows of a request, computed leaf by leaf (leaves.h).
//
// A Worker has open(unit); leaf(index, states, o), of the open unit; close_row(r, state, o), which tells whether the row
// is finite; only(unit, r); and done(). A Unit has rows, and the leaves [leaf0, leaf1) that hold all keys of its rows.
#pragma once
#include <omp.h>
#include <algorithm>
#include <new>
#include <vector>
#include "leaves.h"
#include "scratch.h"

namespace bi {
namespace {

constexpr int64_t kTinyWork = 1 << 15;  // multiply-adds; below this, waking threads costs more than it saves

// A row of p holds zeros for keys that the row does not see, and zero times an infinite value or NaN is NaN. So rows
// of a unit that are not finite are computed again, each alone. run_o, leaf_o: [dim].
template <class Worker, class Unit>
void again(Worker& w, const Unit& u, const bool* finite, float* run_o, float* leaf_o, int dim) {
  for (int r = 0; r < u.rows && u.rows > 1; ++r) {
    if (finite[r]) continue;
    const Unit one = w.only(u, r);
    w.open(one);
    State run, st;
    for (int leaf = one.leaf0; leaf < one.leaf1; ++leaf) {
      w.leaf(leaf, &st, leaf_o);
      merge(run, run_o, st, leaf_o, dim);
    }
    w.close_row(0, run, run_o);
  }
}

// Computes all units, of at most TILE rows each. dim: elements of a row of the output, a multiple of 16.
template <class Worker, int TILE, class Unit, class Args>
void run_units(const std::vector<Unit>& units, const Args& a, int dim, int threads) {
  int64_t keys = 0;
  for (int r = 0; r < a.reqs; ++r)
    keys += int64_t(a.seq_lens[r]) * (a.query_start[r + 1] - a.query_start[r]);
  if (keys * a.heads * dim < kTinyWork) threads = 1;
  std::vector<int64_t> first(units.size() + 1, 0);  // first leaf task of each unit
  std::vector<int64_t> row_at(units.size() + 1, 0);  // first result row of each unit
  for (size_t i = 0; i < units.size(); ++i) {
    const int leaves = units[i].leaf1 - units[i].leaf0;
    first[i + 1] = first[i] + leaves;
    row_at[i + 1] = row_at[i] + int64_t(leaves) * units[i].rows;
  }
  // Few units and long contexts: compute leaves in parallel and merge them in the same order.
  const bool split = threads > 1 && units.size() < size_t(4 * threads) && first.back() > int64_t(units.size());
  static thread_local Scratch split_o;
  std::vector<State> split_st(split ? row_at.back() : 0);
  float* const so = split ? split_o.get<float>(row_at.back() * dim) : nullptr;
  const int64_t tasks = split ? first.back() : int64_t(units.size());
#pragma omp parallel num_threads(threads) if (tasks > 1)
  {
    static thread_local Scratch worker_mem, o_mem;
    Worker& w = *new (worker_mem.get<Worker>(1)) Worker(a);
    float* const run_o = o_mem.get<float>(size_t(2 * TILE) * dim);
    float* const leaf_o = run_o + size_t(TILE) * dim;
    State run_st[TILE], leaf_st[TILE];
    bool finite[TILE];
    if (split) {
#pragma omp for schedule(dynamic, 1)
      for (int64_t t = 0; t < tasks; ++t) {
        const size_t i = std::upper_bound(first.begin(), first.end(), t) - first.begin() - 1;
        const int64_t at = row_at[i] + (t - first[i]) * units[i].rows;
        w.open(units[i]);
        w.leaf(units[i].leaf0 + int(t - first[i]), split_st.data() + at, so + at * dim);
      }
#pragma omp for schedule(dynamic, 1)
      for (size_t i = 0; i < units.size(); ++i) {
        const Unit& u = units[i];
        w.open(u);
        for (int r = 0; r < u.rows; ++r) {
          State st;
          for (int64_t at = row_at[i] + r; at < row_at[i + 1]; at += u.rows)
            merge(st, run_o, split_st[at], so + at * dim, dim);
          finite[r] = w.close_row(r, st, run_o);
        }
        again(w, u, finite, run_o, leaf_o, dim);
      }
    } else {
#pragma omp for schedule(dynamic, 1)
      for (int64_t t = 0; t < tasks; ++t) {
        const Unit& u = units[t];
        w.open(u);
        for (int r = 0; r < u.rows; ++r) run_st[r] = State{};
        for (int leaf = u.leaf0; leaf < u.leaf1; ++leaf) {
          w.leaf(leaf, leaf_st, leaf_o);
          for (int r = 0; r < u.rows; ++r) merge(run_st[r], run_o + r * dim, leaf_st[r], leaf_o + r * dim, dim);
        }
        for (int r = 0; r < u.rows; ++r) finite[r] = w.close_row(r, run_st[r], run_o + r * dim);
        again(w, u, finite, run_o, leaf_o, dim);
      }
    }
    w.done();
  }
}

}  // namespace
}  // namespace bi
