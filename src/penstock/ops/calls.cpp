// Calls of native functions, made one after the other. Called by calls.py.

#include <cstdint>

namespace {

constexpr int NUMBERS = 13;

// A function that returns nothing, and what it is given: addresses and whole numbers in their order, and a real number.
struct Call {
    void *function;
    int64_t numbers[NUMBERS];
    double real;
};

}  // namespace

// Functions are called as if all of them took NUMBERS whole numbers and a real one. On x86-64 and ARM, real numbers go
// in registers of their own, wherever they stand among the others, those in further registers or on the stack are there
// for whoever looks, and the caller clears up.
extern "C" void call(const Call *calls, int64_t count) {
    using function = void (*)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                              int64_t, int64_t, int64_t, double);
    for (const Call *each = calls; each < calls + count; ++each) {
        const int64_t *n = each->numbers;
        reinterpret_cast<function>(each->function)(n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9], n[10],
                                                   n[11], n[12], each->real);
    }
}
