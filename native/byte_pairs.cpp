#include "byte_pairs.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <stdexcept>

namespace chalot {

namespace {

constexpr uint32_t NONE = 0xffffffff;
constexpr size_t SHORT = 48;      // letters, up to which looking through all pairs beats a heap
constexpr size_t KEPT = 1 << 16;  // letters that memory is kept for from word to word

struct Character {
  uint32_t code;
  uint32_t size;  // bytes, 0 at the end
};

// Bytes that are not UTF-8 are one character each; nothing is read past `end`.
Character decode(const uint8_t* at, const uint8_t* end) {
  if (at >= end) return {0, 0};
  if (at[0] < 0x80) return {at[0], 1};
  if (at[0] >= 0xc2 && at[0] < 0xe0 && end - at >= 2) return {uint32_t(at[0] & 31) << 6 | (at[1] & 63), 2};
  if (at[0] >= 0xe0 && at[0] < 0xf0 && end - at >= 3)
    return {uint32_t(at[0] & 15) << 12 | (at[1] & 63) << 6 | (at[2] & 63), 3};
  if (at[0] >= 0xf0 && at[0] < 0xf4 && end - at >= 4)
    return {uint32_t(at[0] & 7) << 18 | (at[1] & 63) << 12 | (at[2] & 63) << 6 | (at[3] & 63), 4};
  if (at[0] == 0xf4 && end - at >= 4 && at[1] < 0x90)
    return {0x100000u | (at[1] & 15) << 12 | (at[2] & 63) << 6 | (at[3] & 63), 4};
  return {at[0], 1};
}

bool newline(uint32_t code) { return code == '\n' || code == '\r'; }

// The patterns' alternatives in their order, at one place of a text; each gives the end of its match or nullptr.
class Splitter {
 public:
  Splitter(const uint8_t* kinds, const Style& style, const uint8_t* end) : kinds_(kinds), style_(style), end_(end) {}

  const uint8_t* next(const uint8_t* at) const {
    Character c = decode(at, end_);
    if (c.code == '\'')
      if (const uint8_t* e = contraction(at + 1)) return e;
    const uint8_t* second = at + c.size;
    Character d = decode(second, end_);
    Kind kind = kind_of(c), then = kind_of(d);
    if (kind == LETTER) return run(second, LETTER, 0);
    bool lead = style_.any_lead ? kind != NUMBER && !newline(c.code) : c.code == ' ';
    if (lead && d.size && then == LETTER) return run(second, LETTER, 0);
    if (kind == NUMBER) return run(second, NUMBER, style_.digits ? style_.digits - 1 : -1);
    if (style_.digit_lead && c.code == ' ' && d.size && then == NUMBER)
      return run(second, NUMBER, style_.digits ? style_.digits : -1);
    if (kind == OTHER || (c.code == ' ' && d.size && then == OTHER)) return signs(second);
    return space(at);
  }

 private:
  Kind kind_of(Character c) const { return Kind(kinds_[c.code]); }

  // Characters of one kind from `at` on, at most `most` of them (0 or less: all; -1 of digits: all).
  const uint8_t* run(const uint8_t* at, Kind kind, int most) const {
    bool limited = kind == NUMBER && most >= 0;
    for (;;) {
      if (limited && most-- == 0) return at;
      Character c = decode(at, end_);
      if (!c.size || kind_of(c) != kind) return at;
      at += c.size;
    }
  }

  const uint8_t* signs(const uint8_t* at) const {
    at = run(at, OTHER, 0);
    if (style_.newline_tail)
      while (at < end_ && newline(*at)) at++;
    return at;
  }

  const uint8_t* space(const uint8_t* at) const {
    const uint8_t *last = at, *after_newline = nullptr, *p = at;
    for (Character c = decode(p, end_); c.size && kind_of(c) == SPACE; c = decode(p, end_)) {
      last = p;
      p += c.size;
      if (newline(c.code)) after_newline = p;
    }
    if (style_.newline_runs && after_newline) return after_newline;
    return p == end_ || last == at ? p : last;  // the last one goes with what follows
  }

  const uint8_t* contraction(const uint8_t* at) const {
    auto letter = [&](const uint8_t* p) -> int {
      if (p >= end_) return 0;
      return style_.folds && *p >= 'A' && *p <= 'Z' ? *p + 32 : *p;
    };
    int a = letter(at), b = a ? letter(at + 1) : 0;
    if (a == 's' || a == 't' || a == 'm' || a == 'd') return at + 1;
    if (((a == 'r' || a == 'v') && b == 'e') || (a == 'l' && b == 'l')) return at + 2;
    if (style_.folds && a == 0xc5 && end_ - at >= 2 && at[1] == 0xbf) return at + 2;  // U+017F is an s
    return nullptr;
  }

  const uint8_t* kinds_;
  const Style& style_;
  const uint8_t* end_;
};

}  // namespace

struct BytePairs::Known {
  static constexpr size_t COUNT = 16384, BYTES = 27, IDS = 8;
  uint8_t size, ids;
  uint8_t bytes[BYTES + 3];
  uint32_t id[IDS];
};

BytePairs::BytePairs(const uint64_t* pairs, const uint32_t* merges, size_t count, uint32_t tokens)
    : pairs_(pairs), merges_(merges), tokens_(tokens) {
  if (tokens >= NONE || count >= NONE) throw std::invalid_argument("too many tokens");
  first_.assign(size_t(tokens) + 1, uint32_t(count));
  uint32_t left = 0;  // first_ is known up to it
  for (size_t i = 0; i < count; i++) {
    if (i && pairs[i] <= pairs[i - 1]) throw std::invalid_argument("pairs are not ascending");
    if (pairs[i] >> 32 >= tokens || merges[2 * i + 1] >= tokens) throw std::invalid_argument("an id has no token");
    while (left <= pairs[i] >> 32) first_[left++] = uint32_t(i);
  }
}

// Which pair it is, or NONE.
uint32_t BytePairs::find(uint32_t left, uint32_t right) const {
  if (left >= tokens_) return NONE;
  const uint64_t pair = uint64_t(left) << 32 | right;
  const uint64_t *from = pairs_ + first_[left], *to = pairs_ + first_[left + 1];
  const uint64_t* at = std::lower_bound(from, to, pair);
  return at != to && *at == pair ? uint32_t(at - pairs_) : NONE;
}

void BytePairs::merge(const uint32_t* letters, size_t count, std::vector<uint32_t>& out) {
  if (count >= NONE) throw std::invalid_argument("a word is too long");
  if (count < 2) {
    out.insert(out.end(), letters, letters + count);
    return;
  }
  ids_.assign(letters, letters + count);
  place_.resize(count);
  for (size_t i = 0; i + 1 < count; i++) place_[i] = find(ids_[i], ids_[i + 1]);
  place_[count - 1] = NONE;
  if (count <= SHORT)
    merge_short(count, out);
  else
    merge_long(count, out);
}

void BytePairs::merge_short(size_t count, std::vector<uint32_t>& out) {
  uint32_t *ids = ids_.data(), *place = place_.data();
  for (;;) {
    size_t best = count;
    uint32_t least = NONE;
    for (size_t i = 0; i + 1 < count; i++)
      if (place[i] != NONE && merges_[2 * place[i]] < least) least = merges_[2 * place[i]], best = i;
    if (best == count) break;
    ids[best] = merges_[2 * place[best] + 1];
    std::copy(ids + best + 2, ids + count, ids + best + 1);
    std::copy(place + best + 2, place + count, place + best + 1);
    count--;
    place[best] = best + 1 < count ? find(ids[best], ids[best + 1]) : NONE;
    if (best) place[best - 1] = find(ids[best - 1], ids[best]);
  }
  out.insert(out.end(), ids, ids + count);
}

// A heap of (rank, where), whose entries are outdated once another pair stands there: n log n.
void BytePairs::merge_long(size_t count, std::vector<uint32_t>& out) {
  before_.resize(count);
  after_.resize(count);
  heap_.clear();
  auto offer = [&](uint32_t at) {
    if (place_[at] != NONE) heap_.push_back(uint64_t(merges_[2 * place_[at]]) << 32 | at);
  };
  for (uint32_t i = 0; i < count; i++) {
    before_[i] = i ? i - 1 : NONE;
    after_[i] = i + 1 < count ? i + 1 : NONE;
    offer(i);
  }
  const auto later = std::greater<uint64_t>();
  std::make_heap(heap_.begin(), heap_.end(), later);
  auto changed = [&](uint32_t at) {
    place_[at] = after_[at] == NONE ? NONE : find(ids_[at], ids_[after_[at]]);
    if (place_[at] == NONE) return;
    offer(at);
    std::push_heap(heap_.begin(), heap_.end(), later);
  };
  while (!heap_.empty()) {
    std::pop_heap(heap_.begin(), heap_.end(), later);
    const uint32_t at = uint32_t(heap_.back()), rank = uint32_t(heap_.back() >> 32);
    heap_.pop_back();
    if (place_[at] == NONE || merges_[2 * place_[at]] != rank) continue;
    const uint32_t gone = after_[at];
    ids_[at] = merges_[2 * place_[at] + 1];
    ids_[gone] = place_[gone] = NONE;
    after_[at] = after_[gone];
    if (after_[at] != NONE) before_[after_[at]] = at;
    changed(at);
    if (before_[at] != NONE) changed(before_[at]);
  }
  for (uint32_t at = 0; at != NONE; at = after_[at]) out.push_back(ids_[at]);
  if (count > KEPT) {  // a text without spaces; the next one may be short
    for (auto* room : {&ids_, &place_, &before_, &after_, &letters_}) std::vector<uint32_t>().swap(*room);
    std::vector<uint64_t>().swap(heap_);
  }
}

void BytePairs::words(const uint32_t* letters, size_t count, const uint64_t* ends, size_t words,
                      std::vector<uint32_t>& out) {
  size_t at = 0;
  for (size_t i = 0; i < words; i++) {
    if (ends[i] < at || ends[i] > count) throw std::invalid_argument("ends of words are not ascending");
    merge(letters + at, ends[i] - at, out);
    at = ends[i];
  }
}

void BytePairs::set_alphabet(const uint32_t* bytes, const uint8_t* kinds) {
  bytes_.assign(bytes, bytes + 256);
  kinds_.assign(kinds, kinds + 0x110000);
}

void BytePairs::set_whole(const std::string& word, uint32_t id) { whole_[word] = id; }

void BytePairs::word(const uint8_t* bytes, size_t size, std::vector<uint32_t>& out) {
  Known* slot = nullptr;
  if (size <= Known::BYTES) {
    uint64_t hash = 0xcbf29ce484222325;  // FNV-1a
    for (size_t i = 0; i < size; i++) hash = (hash ^ bytes[i]) * 0x100000001b3;
    slot = reinterpret_cast<Known*>(known_.data()) + (hash ^ hash >> 29) % Known::COUNT;
    if (slot->size == size && !std::memcmp(slot->bytes, bytes, size)) {
      out.insert(out.end(), slot->id, slot->id + slot->ids);
      return;
    }
  }
  const size_t first = out.size();
  const auto found = whole_.empty() ? whole_.end() : whole_.find(std::string(bytes, bytes + size));
  if (found != whole_.end()) {
    out.push_back(found->second);
  } else {
    letters_.resize(size);
    for (size_t i = 0; i < size; i++) letters_[i] = bytes_[bytes[i]];
    merge(letters_.data(), size, out);
  }
  if (slot && out.size() - first <= Known::IDS) {
    slot->size = uint8_t(size);
    slot->ids = uint8_t(out.size() - first);
    std::copy(bytes, bytes + size, slot->bytes);
    std::copy(out.begin() + first, out.end(), slot->id);
  }
}

void BytePairs::text(const uint8_t* text, size_t size, const Style& style, std::vector<uint32_t>& out) {
  if (bytes_.empty()) throw std::invalid_argument("there is no alphabet");
  known_.resize(Known::COUNT * sizeof(Known));
  const uint8_t* end = text + size;
  const Splitter splitter(kinds_.data(), style, end);
  while (text < end) {
    const uint8_t* next = splitter.next(text);
    word(text, next - text, out);
    text = next;
  }
}

}  // namespace chalot
