// Byte-pair encoding: texts to words as GPT-2, Llama 3 and Qwen2 split them, words to token ids. Knows no files.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace chalot {

// What differs between the splitting patterns (text/styles.py has the patterns themselves).
struct Style {
  bool folds;         // contractions in capitals too
  bool any_lead;      // one character of any kind before letters, else only a space
  bool digit_lead;    // a space before digits
  bool newline_tail;  // newlines after signs belong to them
  bool newline_runs;  // white space up to its last newline is one word
  int digits;         // most in a word, 0: no limit
};

enum Kind : uint8_t { OTHER, LETTER, NUMBER, SPACE };

class BytePairs {
 public:
  // pairs ascending (left << 32 | right), merges (rank, merged id) of each; ids are below `tokens`. The arrays must
  // stay. Throws std::invalid_argument where that does not hold.
  BytePairs(const uint64_t* pairs, const uint32_t* merges, size_t count, uint32_t tokens);

  // Words that end at `ends` (ascending, the last one at `count`) of letters' ids; ids are added to `out`.
  void words(const uint32_t* letters, size_t count, const uint64_t* ends, size_t words, std::vector<uint32_t>& out);

  // Ids of bytes, the kind of every code point (0x110000 of them), and words that are tokens whatever merges say.
  void set_alphabet(const uint32_t* bytes, const uint8_t* kinds);
  void set_whole(const std::string& word, uint32_t id);
  // Ids of UTF-8 are added to `out`. Needs an alphabet.
  void text(const uint8_t* text, size_t size, const Style& style, std::vector<uint32_t>& out);

 private:
  struct Known;  // a word's ids, kept for when it comes again
  uint32_t find(uint32_t left, uint32_t right) const;
  void merge(const uint32_t* letters, size_t count, std::vector<uint32_t>& out);
  void merge_short(size_t count, std::vector<uint32_t>& out);
  void merge_long(size_t count, std::vector<uint32_t>& out);
  void word(const uint8_t* bytes, size_t size, std::vector<uint32_t>& out);

  const uint64_t* pairs_;
  const uint32_t* merges_;
  uint32_t tokens_;
  std::vector<uint32_t> first_;  // of each left id, the first of its pairs
  std::vector<uint32_t> bytes_;
  std::vector<uint8_t> kinds_;
  std::unordered_map<std::string, uint32_t> whole_;
  std::vector<uint32_t> ids_, place_, before_, after_;  // of the word that is being merged
  std::vector<uint32_t> letters_;
  std::vector<uint64_t> heap_;
  std::vector<uint8_t> known_;
};

}  // namespace chalot
