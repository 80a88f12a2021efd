// The Python face of index_runs.h: buffers in, one buffer of answers out.
//
// Many read or one writes: a read-write lock in which a waiting writer goes first. A call that turns out
// long goes on without the interpreter's lock, and a long write gives readers their turn every
// `write_blocks`. Nobody waits for the interpreter's lock while holding the other: that would be a deadlock.

#include <pthread.h>
#include <pybind11/pybind11.h>

#include <chrono>
#include <cstring>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "index_tokens.h"
#include "index_walk.h"

namespace py = pybind11;

namespace {

using namespace kvcache::index;

constexpr u32 write_blocks = 256;       // Under one hold of the lock.
constexpr u32 quick_blocks = 512;       // A write of more releases the interpreter's lock.
constexpr u32 quick_chains = 128;       // A read of more does.
constexpr std::size_t blocks_max = 1u << 30;
constexpr u32 answer_columns = sizeof(Answer) / sizeof(u32);

// Becomes BadInput.
struct Refusal {
    const char* code;
    std::string what;
};

class Lock {
public:
    Lock() {
        pthread_rwlockattr_t attributes;
        pthread_rwlockattr_init(&attributes);
#if defined(__GLIBC__)
        pthread_rwlockattr_setkind_np(&attributes, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
#endif
        pthread_rwlock_init(&lock_, &attributes);
        pthread_rwlockattr_destroy(&attributes);
    }
    ~Lock() { pthread_rwlock_destroy(&lock_); }
    Lock(const Lock&) = delete;
    Lock& operator=(const Lock&) = delete;

    void read() { pthread_rwlock_rdlock(&lock_); }
    void write() { pthread_rwlock_wrlock(&lock_); }
    void unlock() { pthread_rwlock_unlock(&lock_); }

private:
    pthread_rwlock_t lock_;
};

class Reading {
public:
    explicit Reading(Lock& lock) : lock_(lock) { lock_.read(); }
    ~Reading() { lock_.unlock(); }
    Reading(const Reading&) = delete;
    Reading& operator=(const Reading&) = delete;

private:
    Lock& lock_;
};

class Writing {
public:
    explicit Writing(Lock& lock) : lock_(lock) { lock_.write(); }
    ~Writing() { lock_.unlock(); }
    Writing(const Writing&) = delete;
    Writing& operator=(const Writing&) = delete;

private:
    Lock& lock_;
};

// Integers of `Item`'s size, or bytes that are whole ones; copied only where they are not aligned.
template <typename Item>
class Items {
public:
    explicit Items(py::handle owner) {
        if (PyObject_GetBuffer(owner.ptr(), &buffer_, PyBUF_ND | PyBUF_FORMAT) != 0) {
            if (PyErr_ExceptionMatches(PyExc_TypeError)) throw py::error_already_set();
            PyErr_Clear();
            throw Refusal{"bad_prefix", "the buffer is not contiguous"};
        }
        const auto bytes = static_cast<std::size_t>(buffer_.len);
        if (!fits() || bytes % sizeof(Item) != 0 || bytes / sizeof(Item) > blocks_max) {
            PyBuffer_Release(&buffer_);
            throw Refusal{"bad_prefix", "the buffer is not of " + std::to_string(8 * sizeof(Item)) +
                                            "-bit integers"};
        }
        count_ = static_cast<u32>(bytes / sizeof(Item));
        items_ = static_cast<const Item*>(buffer_.buf);
        if (reinterpret_cast<std::uintptr_t>(items_) % alignof(Item) == 0) return;
        copied_.resize(count_);
        std::memcpy(copied_.data(), buffer_.buf, bytes);
        items_ = copied_.data();
    }
    ~Items() { PyBuffer_Release(&buffer_); }
    Items(const Items&) = delete;
    Items& operator=(const Items&) = delete;

    const Item* data() const { return items_; }
    u32 count() const { return count_; }

private:
    bool fits() const {
        const char* format = buffer_.format == nullptr ? "B" : buffer_.format;
        if (*format == '<' || *format == '@' || *format == '=') ++format;
        if (std::strlen(format) != 1) return false;
        if (buffer_.itemsize == 1) return std::strchr("Bbc", *format) != nullptr;
        return buffer_.itemsize == sizeof(Item) && std::strchr("QqLlIi", *format) != nullptr;
    }

    Py_buffer buffer_{};
    std::vector<Item> copied_;
    const Item* items_ = nullptr;
    u32 count_ = 0;
};

class Match {
public:
    std::vector<Answer> answers;
    std::vector<u32> ends;  // Of `match_many`: where the answers of each query end.
};

// All of it: `answer_columns` u32 an answer.
int match_buffer(PyObject* self, Py_buffer* view, int flags) {
    static Py_ssize_t strides[] = {sizeof(u32)};
    if ((flags & PyBUF_WRITABLE) != 0) {
        PyErr_SetString(PyExc_BufferError, "answers are read-only");
        return -1;
    }
    auto& answers = py::handle(self).cast<Match&>().answers;
    *view = Py_buffer{};
    view->buf = answers.data();
    view->len = static_cast<Py_ssize_t>(answers.size() * sizeof(Answer));
    view->itemsize = sizeof(u32);
    view->readonly = 1;
    view->ndim = 1;
    view->format = (flags & PyBUF_FORMAT) != 0 ? const_cast<char*>("I") : nullptr;
    if ((flags & PyBUF_ND) != 0) {
        view->shape = reinterpret_cast<Py_ssize_t*>(&view->internal);
        view->internal = reinterpret_cast<void*>(view->len / static_cast<Py_ssize_t>(sizeof(u32)));
    }
    if ((flags & PyBUF_STRIDES) == PyBUF_STRIDES) view->strides = strides;
    view->obj = self;
    Py_INCREF(self);
    return 0;
}

py::object view_of_match(py::handle self) {
    auto whole = py::reinterpret_steal<py::object>(PyMemoryView_FromObject(self.ptr()));
    if (!whole) throw py::error_already_set();
    return whole;
}

py::object column(py::handle self, u32 number) {
    const py::object whole = view_of_match(self);
    const py::slice every(static_cast<py::ssize_t>(number), std::nullopt, static_cast<py::ssize_t>(answer_columns));
    return whole[every];
}

py::object view_of(const void* items, std::size_t bytes, const char* format) {
    const py::bytes copied(static_cast<const char*>(items), bytes);
    return py::memoryview(copied).attr("cast")(format);
}

py::dict as_dict(const Match& match) {
    py::dict made;
    for (const Answer& answer : match.answers)
        made[py::make_tuple(answer.worker, answer.rank)] = answer.blocks;
    return made;
}

std::vector<u64> names_of(const Items<u32>& tokens, u32 block_tokens, u64 root) {
    if (block_tokens == 0) throw Refusal{"bad_prefix", "a block of no tokens"};
    std::vector<u64> names(tokens.count() / block_tokens);
    const std::size_t step = block_tokens * sizeof(u32);
    const u8* at = reinterpret_cast<const u8*>(tokens.data());
    for (u64& name : names) {
        name = root = seeded_sum(at, step, root);
        at += step;
    }
    return names;
}

py::object name_blocks(py::handle tokens, u32 block_tokens, u64 root) {
    const auto names = names_of(Items<u32>(tokens), block_tokens, root);
    return view_of(names.data(), names.size() * sizeof(u64), "Q");
}

class Index {
public:
    explicit Index(std::size_t bytes_max) : runs_(bytes_max) {}

    u64 open(u32 worker, u32 rank) { return opened(worker, rank, true); }
    u64 open_shadow(u32 worker, u32 rank) { return opened(worker, rank, false); }

    void serve(u64 holder) {
        const py::gil_scoped_release released;
        u32 former = Runs::no_row;
        {
            const Writing writing(lock_);
            former = runs_.serve(row_of(holder));
        }
        if (former != Runs::no_row) drain(former);
    }

    void close(u64 holder) {
        const py::gil_scoped_release released;
        const u32 row = static_cast<u32>(holder);
        {
            const Writing writing(lock_);
            runs_.retire(row_of(holder));
        }
        drain(row);
    }

    u32 store(u64 holder, u32 tier, py::handle hashes, const py::object& parent) {
        const Items<u64> blocks(hashes);
        const bool has_parent = !parent.is_none();
        const u64 before = has_parent ? parent.cast<u64>() : 0;
        return written(blocks, [&](u32 from, u32 count) {
            const u64* known = from > 0 ? blocks.data() + from - 1 : has_parent ? &before : nullptr;
            return runs_.store(holder_of(holder, tier), blocks.data() + from, count, known, true);
        });
    }

    u32 store_loose(u64 holder, u32 tier, py::handle hashes) {
        const Items<u64> blocks(hashes);
        return written(blocks, [&](u32 from, u32 count) {
            return runs_.store(holder_of(holder, tier), blocks.data() + from, count, nullptr, false);
        });
    }

    u32 remove(u64 holder, u32 tier, py::handle hashes) {
        const Items<u64> blocks(hashes);
        return written(blocks, [&](u32 from, u32 count) {
            return runs_.remove(holder_of(holder, tier), blocks.data() + from, count);
        });
    }

    void clear(u64 holder, u32 tier) {
        const py::gil_scoped_release released;
        for (bool more = true; more;) {
            const Writing writing(lock_);
            more = runs_.clear_some(holder_of(holder, tier));
        }
    }

    Match match(py::handle hashes, u32 tiers) {
        const Items<u64> query(hashes);
        return matched(query.data(), query.count(), tiers);
    }

    Match match_tokens(py::handle tokens, u32 block_tokens, u64 root, u32 tiers) {
        const auto names = names_of(Items<u32>(tokens), block_tokens, root);
        return matched(names.data(), static_cast<u32>(names.size()), tiers);
    }

    Match match_many(py::handle hashes, py::handle ends, u32 tiers) {
        const Items<u64> queries(hashes);
        const Items<u64> limits(ends);
        check_ends(queries, limits);
        Match made;
        each_query(queries, limits, tiers, [&](const Walk& walk) {
            walk.answer(runs_, made.answers);
            made.ends.push_back(static_cast<u32>(made.answers.size()));
        });
        return made;
    }

    // For measurements: the nanoseconds that each query took, its answer made and thrown away.
    py::object match_times(py::handle hashes, py::handle ends) {
        const Items<u64> queries(hashes);
        const Items<u64> limits(ends);
        check_ends(queries, limits);
        std::vector<u32> times;
        std::vector<Answer> answers;
        auto before = std::chrono::steady_clock::now();
        times.reserve(limits.count());
        each_query(queries, limits, 0xF, [&](const Walk& walk) {
            answers.clear();
            walk.answer(runs_, answers);
            const auto now = std::chrono::steady_clock::now();
            const auto spent = std::chrono::duration_cast<std::chrono::nanoseconds>(now - before).count();
            times.push_back(static_cast<u32>(spent));
            before = std::chrono::steady_clock::now();
        });
        return view_of(times.data(), times.size() * sizeof(u32), "I");
    }

    py::tuple digest(u64 holder, u32 tier) {
        const Reading reading(lock_);
        const Digest& digest = runs_.rows()[row_of(holder)].digests[holder_of(holder, tier) % tier_count];
        return py::make_tuple(digest.count, digest.joined_xor, digest.sum);
    }

    py::object held(u64 holder, u32 tier) {
        std::vector<u64> hashes;
        {
            const py::gil_scoped_release released;
            const Reading reading(lock_);
            hashes = runs_.held(holder_of(holder, tier));
        }
        return view_of(hashes.data(), hashes.size() * sizeof(u64), "Q");
    }

    py::dict stats() {
        Counts counts{};
        {
            const py::gil_scoped_release released;
            const Reading reading(lock_);
            counts = runs_.counts();
        }
        py::dict made;
        made["blocks"] = counts.blocks;
        made["ghosts"] = counts.ghosts;
        made["members"] = counts.members;
        made["chains"] = counts.chains;
        made["spans"] = counts.spans;
        made["sets"] = counts.sets;
        made["rows"] = counts.rows;
        return made;
    }

    std::size_t bytes() {
        const Reading reading(lock_);
        return runs_.bytes();
    }
    std::size_t bytes_max() const { return runs_.bytes_max(); }

    void check() {
        try {
            const py::gil_scoped_release released;
            const Reading reading(lock_);
            runs_.check();
        } catch (const std::logic_error& broken) {
            PyErr_SetString(PyExc_AssertionError, broken.what());
            throw py::error_already_set();
        }
    }

private:
    Match matched(const u64* query, u32 count, u32 tiers) {
        Match made;
        Walk& walk = scratch();
        walk.start(query, count, tiers);
        std::optional<py::gil_scoped_release> released;
        const Reading reading(lock_);  // Ends first, before the interpreter's lock is taken again.
        if (!walk.advance(runs_, quick_chains)) {
            released.emplace();
            while (!walk.advance(runs_, blocks_max)) {}
        }
        walk.answer(runs_, made.answers);
        return made;
    }

    static Walk& scratch() {
        static thread_local Walk walk;
        return walk;
    }

    u64 opened(u32 worker, u32 rank, bool serves) {
        const py::gil_scoped_release released;
        u32 former = Runs::no_row;
        u64 holder = 0;
        {
            const Writing writing(lock_);
            const u32 row = runs_.open(worker, rank);
            if (row == Runs::no_row) throw Refusal{"too_large", "more rows than an index can have"};
            holder = static_cast<u64>(runs_.rows()[row].generation) << 32 | row;
            if (serves) former = runs_.serve(row);
        }
        if (former != Runs::no_row) drain(former);
        return holder;
    }

    // REQUIRES: the lock.
    u32 row_of(u64 holder) const {
        const u32 row = static_cast<u32>(holder);
        const auto& rows = runs_.rows();
        if (row >= rows.size() || rows[row].state == State::free || rows[row].generation != holder >> 32)
            throw Refusal{"bad_holder", "holder " + std::to_string(holder) + " is not open"};
        return row;
    }
    u32 holder_of(u64 holder, u32 tier) const {
        if (tier >= tier_count) throw Refusal{"bad_holder", "there is no tier " + std::to_string(tier)};
        return row_of(holder) * tier_count + tier;
    }

    // What `write(from, count)` returns for each part, summed.
    template <typename Write>
    u32 written(const Items<u64>& blocks, Write write) {
        u32 result = 0;
        const auto all = [&] {
            u32 from = 0;
            do {
                const u32 count = std::min(write_blocks, blocks.count() - from);
                const Writing writing(lock_);
                result += write(from, count);
                from += count;
            } while (from < blocks.count());
        };
        if (blocks.count() <= quick_blocks) {
            all();
        } else {
            const py::gil_scoped_release released;
            all();
        }
        return result;
    }

    // REQUIRES: it was retired, so nobody else writes to it.
    void drain(u32 row) {
        for (u32 tier = 0; tier < tier_count; ++tier)
            for (bool more = true; more;) {
                const Writing writing(lock_);
                more = runs_.clear_some(row * tier_count + tier);
            }
        const Writing writing(lock_);
        runs_.free(row);
    }

    static void check_ends(const Items<u64>& queries, const Items<u64>& limits) {
        u64 last = 0;
        for (u32 i = 0; i < limits.count(); ++i) {
            if (limits.data()[i] < last || limits.data()[i] > queries.count())
                throw Refusal{"bad_prefix", "end " + std::to_string(i) + " of a query is before the last, or too far"};
            last = limits.data()[i];
        }
    }

    template <typename Each>
    void each_query(const Items<u64>& queries, const Items<u64>& limits, u32 tiers, Each each) {
        const py::gil_scoped_release released;
        Walk& walk = scratch();
        u64 from = 0;
        for (u32 i = 0; i < limits.count(); ++i) {
            const u64 to = limits.data()[i];
            walk.start(queries.data() + from, static_cast<u32>(to - from), tiers);
            const Reading reading(lock_);
            while (!walk.advance(runs_, blocks_max)) {}
            each(walk);
            from = to;
        }
    }

    Runs runs_;
    Lock lock_;
};

void refuse(const Refusal& refusal) {
    const py::object bad_input = py::module_::import("kvcache.errors").attr("BadInput");
    const py::object error =
        bad_input(refusal.code, refusal.what, "the index takes u64 buffers, open holders and tiers 0 to 3",
                  "nothing was changed; see kvcache.index");
    PyErr_SetObject(bad_input.ptr(), error.ptr());
}

}  // namespace

PYBIND11_MODULE(index, module) {
    module.doc() = "Who holds which leading blocks. Use kvcache.index.";
    py::register_local_exception_translator([](std::exception_ptr thrown) {
        try {
            if (thrown) std::rethrow_exception(thrown);
        } catch (const Refusal& refusal) {
            refuse(refusal);
        }
    });
    const auto with_buffer = py::custom_type_setup([](PyHeapTypeObject* type) {
        type->as_buffer.bf_getbuffer = match_buffer;
        type->ht_type.tp_as_buffer = &type->as_buffer;
    });
    py::class_<Match>(module, "Match", with_buffer)
        .def("__len__", [](const Match& match) { return match.answers.size(); })
        .def_property_readonly("table", [](py::handle self) { return view_of_match(self); })
        .def_property_readonly("workers", [](py::handle self) { return column(self, 0); })
        .def_property_readonly("dp_ranks", [](py::handle self) { return column(self, 1); })
        .def_property_readonly("blocks", [](py::handle self) { return column(self, 2); })
        .def("tier", [](py::handle self, u32 tier) {
            if (tier >= tier_count) throw Refusal{"bad_holder", "there is no tier " + std::to_string(tier)};
            return column(self, 3 + tier);
        })
        .def_property_readonly("ends", [](const Match& match) {
            return view_of(match.ends.data(), match.ends.size() * sizeof(u32), "I");
        })
        .def("as_dict", &as_dict);
    module.def("name_blocks", &name_blocks, py::arg("tokens"), py::arg("block_tokens"), py::arg("root") = 0);
    py::class_<Index>(module, "PrefixIndex")
        .def(py::init<std::size_t>(), py::arg("bytes_max"))
        .def("open", &Index::open, py::arg("worker"), py::arg("dp_rank") = 0)
        .def("open_shadow", &Index::open_shadow, py::arg("worker"), py::arg("dp_rank") = 0)
        .def("serve", &Index::serve, py::arg("holder"))
        .def("close", &Index::close, py::arg("holder"))
        .def("store", &Index::store, py::arg("holder"), py::arg("tier"), py::arg("hashes"),
             py::arg("parent") = py::none())
        .def("store_loose", &Index::store_loose, py::arg("holder"), py::arg("tier"), py::arg("hashes"))
        .def("remove", &Index::remove, py::arg("holder"), py::arg("tier"), py::arg("hashes"))
        .def("clear", &Index::clear, py::arg("holder"), py::arg("tier"))
        .def("match", &Index::match, py::arg("hashes"), py::arg("tiers") = 0xF)
        .def("match_tokens", &Index::match_tokens, py::arg("tokens"), py::arg("block_tokens"),
             py::arg("root") = 0, py::arg("tiers") = 0xF)
        .def("match_many", &Index::match_many, py::arg("hashes"), py::arg("ends"), py::arg("tiers") = 0xF)
        .def("match_times", &Index::match_times, py::arg("hashes"), py::arg("ends"))
        .def("digest", &Index::digest, py::arg("holder"), py::arg("tier"))
        .def("held", &Index::held, py::arg("holder"), py::arg("tier"))
        .def("stats", &Index::stats)
        .def_property_readonly("bytes", &Index::bytes)
        .def_property_readonly("bytes_max", &Index::bytes_max)
        .def("check", &Index::check);
}
