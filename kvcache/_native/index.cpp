// The Python face of index_runs.h: buffers in, one buffer of answers out.
//
// Many read or one writes: a read-write lock in which a waiting writer goes first. A call that turns out
// long goes on without the interpreter's lock, and a long write gives readers their turn every
// `write_blocks`. Nobody waits for the interpreter's lock while holding the other: that would be a deadlock. So
// nothing that may collect garbage is done under it: what that runs may ask the index, or wait for a thread that does.

#include <algorithm>
#include <chrono>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

#include "index_lock.h"
#include "index_match.h"
#include "index_names.h"

namespace {

using namespace kvcache::index;

constexpr u32 write_blocks = 256;       // Under one hold of the lock.
constexpr u32 quick_blocks = 512;       // A write of more releases the interpreter's lock.
constexpr u32 quick_chains = 128;       // A read of more does.

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
        return stored(blocks, [&](u32 from, u32 count) {
            const u64* known = from > 0 ? blocks.data() + from - 1 : has_parent ? &before : nullptr;
            return runs_.store(holder_of(holder, tier), blocks.data() + from, count, known, true);
        });
    }

    u32 store_runs(u64 holder, u32 tier, py::handle hashes, py::handle lengths) {
        const Items<u64> blocks(hashes);
        const Items<u16> runs(lengths);
        const u64 sum = std::accumulate(runs.data(), runs.data() + runs.count(), u64{0});
        if (sum != blocks.count()) throw Refusal{"bad_prefix", "the runs are not as long as the blocks"};
        const py::gil_scoped_release released;
        u32 at = 0;
        u32 run = 0;
        u32 end = 0;  // Of the run before `run`.
        do {
            const Writing writing(lock_);
            const u32 number = holder_of(holder, tier);
            for (u32 left = write_blocks; left > 0 && at < blocks.count();) {
                const u32 start = at == end ? at : end - runs.data()[run - 1];
                if (at == end) end += runs.data()[run++];
                const u32 count = std::min(left, end - at);
                const u64* before = at > start ? blocks.data() + at - 1 : nullptr;
                const u32 refused = runs_.store(number, blocks.data() + at, count, before, true);
                if (refused > 0) return blocks.count() - at - count + refused;
                at += count;
                left -= count;
            }
        } while (at < blocks.count());
        return 0;
    }

    u32 store_loose(u64 holder, u32 tier, py::handle hashes) {
        const Items<u64> blocks(hashes);
        return stored(blocks, [&](u32 from, u32 count) {
            return runs_.store(holder_of(holder, tier), blocks.data() + from, count, nullptr, false);
        });
    }

    u32 remove(u64 holder, u32 tier, py::handle hashes) {
        const Items<u64> blocks(hashes);
        u32 removed = 0;
        written(blocks, [&](u32 from, u32 count) {
            removed += runs_.remove(holder_of(holder, tier), blocks.data() + from, count);
            return true;
        });
        return removed;
    }

    void clear(u64 holder, u32 tier) {
        const py::gil_scoped_release released;
        for (bool more = true; more;) {
            const Writing writing(lock_);
            more = runs_.clear_some(holder_of(holder, tier));
        }
    }

    // What Python calls, without pybind11 in between: match(hashes, tiers, candidates, limit).
    static PyObject* match(PyObject* self, PyObject* const* arguments, Py_ssize_t count, PyObject* names) {
        try {
            PyObject* given[match_arguments] = {};
            if (!parsed(arguments, count, names, given)) return nullptr;
            const Items<u64> query(given[0]);
            Wanted wanted;
            if (count > 1 || names != nullptr) wanted = wanted_of(given);
            return of_python(self).matched(query.data(), query.count(), wanted);
        } catch (...) {
            raise_thrown();
            return nullptr;
        }
    }

    py::object match_tokens(py::handle tokens, u32 block_tokens, u64 root, u32 tiers, py::handle candidates,
                            std::optional<u32> limit) {
        const auto names = names_of(Items<u32>(tokens), block_tokens, root);
        const Wanted wanted = wanted_of(tiers, candidates, limit);
        return py::reinterpret_steal<py::object>(
            matched(names.data(), static_cast<u32>(names.size()), wanted));
    }

    py::object match_many(py::handle hashes, py::handle ends, u32 tiers, py::handle candidates,
                          std::optional<u32> limit) {
        const Items<u64> queries(hashes);
        const Items<u64> limits(ends);
        check_ends(queries, limits);
        std::vector<u32> columns[column_count];
        std::vector<u32> ended;
        each_query(queries, limits, wanted_of(tiers, candidates, limit), [&](Walk& walk) {
            const std::size_t before = columns[0].size();
            Columns at;
            for (u32 i = 0; i < column_count; ++i) {
                columns[i].resize(before + walk.answer_count());
                at[i] = columns[i].data() + before;
            }
            walk.answer(runs_, at);
            ended.push_back(static_cast<u32>(columns[0].size()));
        });
        Values* made = new_match(static_cast<u32>(columns[0].size()));
        const Columns at = columns_of(made);
        for (u32 i = 0; i < column_count; ++i) std::copy(columns[i].begin(), columns[i].end(), at[i]);
        auto result = py::reinterpret_steal<py::object>(reinterpret_cast<PyObject*>(made));
        made->ends = view_of(std::move(ended)).release().ptr();
        return result;
    }

    // For measurements: the nanoseconds that each query took, its answer made and thrown away.
    py::object match_times(py::handle hashes, py::handle ends) {
        const Items<u64> queries(hashes);
        const Items<u64> limits(ends);
        check_ends(queries, limits);
        std::vector<u32> times;
        std::vector<u32> answers;
        auto before = std::chrono::steady_clock::now();
        times.reserve(limits.count());
        each_query(queries, limits, Wanted(), [&](Walk& walk) {
            answers.resize(std::size_t{walk.answer_count()} * column_count);
            Columns at;
            for (u32 i = 0; i < column_count; ++i) at[i] = answers.data() + std::size_t{i} * walk.answer_count();
            walk.answer(runs_, at);
            const auto now = std::chrono::steady_clock::now();
            const auto spent = std::chrono::duration_cast<std::chrono::nanoseconds>(now - before).count();
            times.push_back(static_cast<u32>(spent));
            before = std::chrono::steady_clock::now();
        });
        return view_of(std::move(times));
    }

    py::tuple digest(u64 holder, u32 tier) {
        Digest digest;
        {
            const Reading reading(lock_);
            digest = runs_.rows()[row_of(holder)].digests[holder_of(holder, tier) % tier_count];
        }
        return py::make_tuple(digest.count, digest.joined_xor, digest.sum);
    }

    py::object held(u64 holder, u32 tier) {
        std::vector<u64> hashes;
        {
            const py::gil_scoped_release released;
            const Reading reading(lock_);
            hashes = runs_.held(holder_of(holder, tier));
        }
        return view_of(std::move(hashes));
    }

    py::tuple runs(u64 holder, u32 tier) {
        std::vector<u64> hashes;
        std::vector<u16> lengths;
        {
            const py::gil_scoped_release released;
            const Reading reading(lock_);
            runs_.runs(holder_of(holder, tier), hashes, lengths);
        }
        return py::make_tuple(view_of(std::move(hashes)), view_of(std::move(lengths)));
    }

    py::dict stats() {
        Counts counts{};
        {
            const py::gil_scoped_release released;
            const Reading reading(lock_);
            runs_.require_whole();
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
            runs_.require_whole();
            runs_.check();
        } catch (const std::logic_error& broken) {
            PyErr_SetString(PyExc_AssertionError, broken.what());
            throw py::error_already_set();
        }
    }

private:
    static constexpr Py_ssize_t match_arguments = 4;

    static Index& of_python(PyObject* self) {
        auto* instance = reinterpret_cast<py::detail::instance*>(self);
        return *static_cast<Index*>(instance->get_value_and_holder().value_ptr());
    }

    // The arguments by their place in `given`; false with Python's error set.
    static bool parsed(PyObject* const* arguments, Py_ssize_t count, PyObject* names, PyObject** given) {
        static const char* const known[match_arguments] = {"hashes", "tiers", "candidates", "limit"};
        std::copy(arguments, arguments + std::min(count, match_arguments), given);
        bool fits = count <= match_arguments;
        for (Py_ssize_t i = 0; names != nullptr && i < PyTuple_GET_SIZE(names); ++i) {
            Py_ssize_t at = 0;
            while (at < match_arguments &&
                   PyUnicode_CompareWithASCIIString(PyTuple_GET_ITEM(names, i), known[at]) != 0)
                ++at;
            if (at == match_arguments || given[at] != nullptr) {
                fits = false;
            } else {
                given[at] = arguments[count + i];
            }
        }
        if (fits && given[0] != nullptr) return true;
        PyErr_SetString(PyExc_TypeError, "match takes hashes, tiers, candidates and limit");
        return false;
    }

    static Wanted wanted_of(PyObject* const* given) {
        const py::handle candidates = given[2] == nullptr ? Py_None : given[2];
        const bool limited = given[3] != nullptr && given[3] != Py_None;
        return wanted_of(given[1] == nullptr ? 0xF : py::cast<u32>(given[1]), candidates,
                         limited ? std::optional<u32>(py::cast<u32>(given[3])) : std::nullopt);
    }

    static Wanted wanted_of(u32 tiers, py::handle candidates, std::optional<u32> limit) {
        static thread_local Chosen chosen;
        Wanted wanted{tiers, nullptr, limit.value_or(0xFFFFFFFF)};
        if (candidates.is_none()) return wanted;
        const Items<u32> workers(candidates);
        chosen.assign(workers.data(), workers.count());
        wanted.candidates = &chosen;
        return wanted;
    }

    // Making an object of ours never waits for the interpreter's lock, so the short way may do it under this one.
    PyObject* matched(const u64* query, u32 count, const Wanted& wanted) {
        Walk& walk = scratch();
        walk.start(query, count, wanted);
        {
            const Reading reading(lock_);
            runs_.require_whole();
            if (walk.advance(runs_, quick_chains)) {
                Values* made = new_match(walk.answer_count());
                walk.answer(runs_, columns_of(made));
                return reinterpret_cast<PyObject*>(made);
            }
        }
        return matched_long(query, count, wanted);
    }

    PyObject* matched_long(const u64* query, u32 count, const Wanted& wanted) {
        Walk& walk = scratch();
        std::vector<u32> answers;
        u32 found = 0;
        {
            const py::gil_scoped_release released;
            const Reading reading(lock_);
            runs_.require_whole();
            walk.start(query, count, wanted);
            while (!walk.advance(runs_, blocks_max)) {}
            found = walk.answer_count();
            answers.resize(std::size_t{found} * column_count);
            Columns at;
            for (u32 i = 0; i < column_count; ++i) at[i] = answers.data() + std::size_t{i} * found;
            walk.answer(runs_, at);
        }
        Values* made = new_match(found);
        std::copy(answers.begin(), answers.end(), made->items);
        return reinterpret_cast<PyObject*>(made);
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
        runs_.require_whole();
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

    // `store(from, count)` part by part, until one refuses some of its last. Returns how many of the last were.
    template <typename Store>
    u32 stored(const Items<u64>& blocks, Store store) {
        u32 refused = 0;
        written(blocks, [&](u32 from, u32 count) {
            const u32 over = store(from, count);
            if (over > 0) refused = blocks.count() - from - count + over;
            return over == 0;
        });
        return refused;
    }

    // Calls `write(from, count)` part by part, until it returns false.
    template <typename Write>
    void written(const Items<u64>& blocks, Write write) {
        const auto all = [&] {
            u32 from = 0;
            for (bool more = true; more;) {
                const u32 count = std::min(write_blocks, blocks.count() - from);
                const Writing writing(lock_);
                more = write(from, count) && (from += count) < blocks.count();
            }
        };
        if (blocks.count() <= quick_blocks) {
            all();
        } else {
            const py::gil_scoped_release released;
            all();
        }
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
    void each_query(const Items<u64>& queries, const Items<u64>& limits, const Wanted& wanted, Each each) {
        const py::gil_scoped_release released;
        Walk& walk = scratch();
        u64 from = 0;
        for (u32 i = 0; i < limits.count(); ++i) {
            const u64 to = limits.data()[i];
            walk.start(queries.data() + from, static_cast<u32>(to - from), wanted);
            const Reading reading(lock_);
            runs_.require_whole();
            while (!walk.advance(runs_, blocks_max)) {}
            each(walk);
            from = to;
        }
    }

    Runs runs_;
    Lock lock_;
};

}  // namespace

PYBIND11_MODULE(index, module) {
    module.doc() = "Who holds which leading blocks. Use kvcache.index.";
    py::register_local_exception_translator([](std::exception_ptr thrown) {
        try {
            if (thrown) std::rethrow_exception(thrown);
        } catch (const Refusal&) {
            raise_thrown();
        }
    });
    define_column<u16>(module, "ColumnOf16", "H");
    define_column<u32>(module, "ColumnOf32", "I");
    define_column<u64>(module, "ColumnOf64", "Q");
    MatchTypes::make(module);
    module.def("name_blocks", &name_blocks, py::arg("tokens"), py::arg("block_tokens"), py::arg("root") = 0);
    module.def("local_hashes", &local_hashes, py::arg("tokens"), py::arg("block_tokens"),
               py::arg("extra") = py::tuple());
    module.def("chain_locals", &chain_locals, py::arg("locals"), py::arg("parent") = py::none());
    module.def("sequence_hashes", &sequence_hashes, py::arg("tokens"), py::arg("block_tokens"),
               py::arg("extra") = py::tuple(), py::arg("parent") = py::none());
    py::class_<Index> index(module, "PrefixIndex");
    index.def(py::init<std::size_t>(), py::arg("bytes_max"))
        .def("open", &Index::open, py::arg("worker"), py::arg("dp_rank") = 0)
        .def("open_shadow", &Index::open_shadow, py::arg("worker"), py::arg("dp_rank") = 0)
        .def("serve", &Index::serve, py::arg("holder"))
        .def("close", &Index::close, py::arg("holder"))
        .def("store", &Index::store, py::arg("holder"), py::arg("tier"), py::arg("hashes"),
             py::arg("parent") = py::none())
        .def("store_runs", &Index::store_runs, py::arg("holder"), py::arg("tier"), py::arg("hashes"),
             py::arg("lengths"))
        .def("store_loose", &Index::store_loose, py::arg("holder"), py::arg("tier"), py::arg("hashes"))
        .def("remove", &Index::remove, py::arg("holder"), py::arg("tier"), py::arg("hashes"))
        .def("clear", &Index::clear, py::arg("holder"), py::arg("tier"))
        .def("match_tokens", &Index::match_tokens, py::arg("tokens"), py::arg("block_tokens"),
             py::arg("root") = 0, py::arg("tiers") = 0xF, py::arg("candidates") = py::none(),
             py::arg("limit") = py::none())
        .def("match_many", &Index::match_many, py::arg("hashes"), py::arg("ends"), py::arg("tiers") = 0xF,
             py::arg("candidates") = py::none(), py::arg("limit") = py::none())
        .def("match_times", &Index::match_times, py::arg("hashes"), py::arg("ends"))
        .def("digest", &Index::digest, py::arg("holder"), py::arg("tier"))
        .def("held", &Index::held, py::arg("holder"), py::arg("tier"))
        .def("runs", &Index::runs, py::arg("holder"), py::arg("tier"))
        .def("stats", &Index::stats)
        .def_property_readonly("bytes", &Index::bytes)
        .def_property_readonly("bytes_max", &Index::bytes_max)
        .def("check", &Index::check);
    static PyMethodDef match = {"match", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&Index::match)),
                                METH_FASTCALL | METH_KEYWORDS, "As kvcache.index.Index says."};
    index.attr("match") = py::reinterpret_steal<py::object>(
        PyDescr_NewMethod(reinterpret_cast<PyTypeObject*>(index.ptr()), &match));
}
