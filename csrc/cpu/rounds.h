// Rounds: vector iterations of kRound elements, the last one padded with zeros. Arithmetic and sums go round by round,
// in an order that does not depend on how wide the registers are.
#pragma once

#include "loops.h"
#include "registers.h"

namespace curveball::cpu {
namespace {

// Element i of a row goes to place i % kRound.
template <typename T>
struct Round {
  static constexpr int64_t kRegisters = kRound / kWidth<T>;
  Register<T> registers[kRegisters];

  // Halves onto halves: a fixed tree.
  T total() const {
    T sums[kRound];
    memcpy(sums, registers, sizeof(sums));
    for (int64_t half = kRound / 2; half > 0; half /= 2) {
      for (int64_t i = 0; i < half; i++) sums[i] += sums[i + half];
    }
    return sums[0];
  }
};

template <typename T>
CURVEBALL_LANES Round<T> round_of(T value) {
  Round<T> round;
  for (Register<T>& r : round.registers) r = splat(value);
  return round;
}

template <typename T>
CURVEBALL_LANES Round<T> operator+(Round<T> a, const Round<T>& b) {
  for (int64_t i = 0; i < Round<T>::kRegisters; i++) a.registers[i] += b.registers[i];
  return a;
}

template <typename T>
CURVEBALL_LANES Round<T> operator-(Round<T> a, const Round<T>& b) {
  for (int64_t i = 0; i < Round<T>::kRegisters; i++) a.registers[i] -= b.registers[i];
  return a;
}

template <typename T>
CURVEBALL_LANES Round<T> operator*(Round<T> a, const Round<T>& b) {
  for (int64_t i = 0; i < Round<T>::kRegisters; i++) a.registers[i] *= b.registers[i];
  return a;
}

// How many elements a step of a loop has: kRound, which the compiler knows, but for the last step.
struct Whole {};

template <typename T>
CURVEBALL_LANES Round<T> load_round(const T* p, Whole) {
  Round<T> round;
  for (int64_t i = 0; i < Round<T>::kRegisters; i++) round.registers[i] = read<Register<T>>(p + i * kWidth<T>);
  return round;
}

// Padded with zeros.
template <typename T>
CURVEBALL_LANES Round<T> load_round(const T* p, int64_t count) {
  T padded[kRound] = {};
  memcpy(padded, p, count * sizeof(T));
  return load_round(padded, Whole{});
}

template <typename T>
CURVEBALL_LANES void store_round(T* p, const Round<T>& round, Whole) {
  for (int64_t i = 0; i < Round<T>::kRegisters; i++) write(p + i * kWidth<T>, round.registers[i]);
}

template <typename T>
CURVEBALL_LANES void store_round(T* p, const Round<T>& round, int64_t count) {
  T padded[kRound];
  store_round(padded, round, Whole{});
  memcpy(p, padded, count * sizeof(T));
}

// Calls step(i, count) for elements begin to end, a round at a time.
template <typename Step>
CURVEBALL_LANES void for_each_round(int64_t begin, int64_t end, const Step& step) {
  int64_t i = begin;
  for (; i + kRound <= end; i += kRound) step(i, Whole{});
  if (i < end) step(i, end - i);
}

}  // namespace
}  // namespace curveball::cpu
