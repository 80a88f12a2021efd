// The Python face of copy.cpp: takes buffers, refuses what does not fit before a byte is written,
// then copies and sums the whole batch with the interpreter's lock released.
//
// Errors are ValueError with the words that kvcache/sums_twin.py uses too; kvcache/sums.py makes them
// BadInput.

#include <pybind11/pybind11.h>

#include <algorithm>
#include <iterator>
#include <string>
#include <utility>
#include <vector>

#include "copy.h"

namespace py = pybind11;

namespace {

using kvcache::Level;
using kvcache::Stores;
using kvcache::u64;
using kvcache::u8;

// From here on a batch is written past the caches: it would push out what others keep there, and its
// reader, another process or a device, finds it in memory anyway. benchmarks/README.md has the figures.
constexpr std::size_t streaming_bytes_min = 256 * 1024;
constexpr std::size_t sum_bytes = 8;

// One exported buffer; the exporter keeps its memory in place until this is gone.
class View {
public:
    View(PyObject* owner, bool writable, const char* role, std::size_t index) {
        if (PyObject_GetBuffer(owner, &buffer_, writable ? PyBUF_WRITABLE : PyBUF_SIMPLE) == 0) return;
        if (PyErr_ExceptionMatches(PyExc_TypeError)) throw py::error_already_set();
        PyErr_Clear();
        const char* why = writable ? " is read-only or not contiguous" : " is not contiguous";
        throw py::value_error(role + (" " + std::to_string(index)) + why);
    }
    View(View&& other) noexcept : buffer_(other.buffer_) { other.buffer_.obj = nullptr; }
    View(const View&) = delete;
    View& operator=(const View&) = delete;
    View& operator=(View&&) = delete;
    ~View() {
        if (buffer_.obj != nullptr) PyBuffer_Release(&buffer_);
    }

    u8* begin() const { return static_cast<u8*>(buffer_.buf); }
    u8* end() const { return begin() + bytes(); }
    std::size_t bytes() const { return static_cast<std::size_t>(buffer_.len); }

private:
    Py_buffer buffer_{};
};

std::vector<View> views_of(const py::sequence& buffers, bool writable, const char* role) {
    const auto items = py::reinterpret_steal<py::object>(PySequence_Fast(buffers.ptr(), "not a sequence"));
    if (!items) throw py::error_already_set();
    const auto count = static_cast<std::size_t>(PySequence_Fast_GET_SIZE(items.ptr()));
    std::vector<View> views;
    views.reserve(count);
    for (std::size_t i = 0; i < count; ++i)
        views.emplace_back(PySequence_Fast_ITEMS(items.ptr())[i], writable, role, i);
    return views;
}

std::string sized(const char* role, std::size_t index, const View& view) {
    return role + (" " + std::to_string(index)) + " has " + std::to_string(view.bytes()) + " bytes";
}

std::size_t count_chunks(const std::vector<View>& views, py::ssize_t chunk_bytes) {
    if (chunk_bytes < 1) throw py::value_error("chunk_bytes is " + std::to_string(chunk_bytes));
    const auto step = static_cast<std::size_t>(chunk_bytes);
    std::size_t count = 0;
    for (std::size_t i = 0; i < views.size(); ++i) {
        if (views[i].bytes() % step != 0)
            throw py::value_error(sized("source", i, views[i]) + ", not a multiple of " +
                                  std::to_string(step));
        count += views[i].bytes() / step;
    }
    return count;
}

// Targets may touch neither each other nor any source. Sources may overlap: they are only read.
void check_apart(const std::vector<View>& sources, const std::vector<View>& targets) {
    using Range = std::pair<const u8*, const u8*>;
    std::vector<Range> ranges;
    ranges.reserve(targets.size());
    for (const View& target : targets)
        if (target.bytes() > 0) ranges.emplace_back(target.begin(), target.end());
    if (!std::is_sorted(ranges.begin(), ranges.end())) std::sort(ranges.begin(), ranges.end());
    for (std::size_t i = 1; i < ranges.size(); ++i)
        if (ranges[i].first < ranges[i - 1].second) throw py::value_error("two targets overlap");
    for (const View& source : sources) {
        if (source.bytes() == 0) continue;
        const auto after = std::lower_bound(ranges.begin(), ranges.end(), Range(source.end(), nullptr));
        if (after != ranges.begin() && std::prev(after)->second > source.begin())
            throw py::value_error("a source and a target overlap");
    }
}

void check_pairs(const std::vector<View>& sources, const std::vector<View>& targets) {
    if (sources.size() != targets.size())
        throw py::value_error(std::to_string(sources.size()) + " sources, " + std::to_string(targets.size()) +
                              " targets");
    for (std::size_t i = 0; i < sources.size(); ++i)
        if (sources[i].bytes() != targets[i].bytes())
            throw py::value_error(sized("source", i, sources[i]) + ", " + sized("target", i, targets[i]));
}

const std::vector<Level>& levels() {
    static const std::vector<Level> found = kvcache::available_levels();
    return found;
}

const Level& level_named(const std::string& name) {
    if (name.empty()) return levels().front();
    for (const Level& level : levels())
        if (name == level.name) return level;
    throw py::value_error("this machine has no level " + name);
}

Stores stores_named(const std::string& name, std::size_t bytes) {
    if (name == "auto") return bytes >= streaming_bytes_min ? Stores::streaming : Stores::cached;
    if (name == "cached") return Stores::cached;
    if (name == "streaming") return Stores::streaming;
    throw py::value_error("no such stores: " + name);
}

// Calls `chunk(view index, offset, sum)` for each chunk, in order, without the interpreter's lock.
template <typename Chunk>
py::bytes each_chunk(const std::vector<View>& views, std::size_t count, std::size_t chunk_bytes,
                     Chunk chunk) {
    auto sums = py::reinterpret_steal<py::bytes>(
        PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(count * sum_bytes)));
    if (!sums) throw py::error_already_set();
    char* at = PyBytes_AS_STRING(sums.ptr());
    {
        const py::gil_scoped_release released;
        for (std::size_t i = 0; i < views.size(); ++i)
            for (std::size_t offset = 0; offset < views[i].bytes(); offset += chunk_bytes, at += sum_bytes) {
                const u64 sum = chunk(i, offset);
                std::memcpy(at, &sum, sum_bytes);
            }
        kvcache::finish_stores();
    }
    return sums;
}

py::bytes copy_and_sum(const py::sequence& sources, const py::sequence& targets, py::ssize_t chunk_bytes,
                       const std::string& level_name, const std::string& stores_name) {
    const Level& level = level_named(level_name);
    const auto from = views_of(sources, false, "source");
    const auto into = views_of(targets, true, "target");
    const std::size_t count = count_chunks(from, chunk_bytes);
    check_pairs(from, into);
    check_apart(from, into);
    const auto step = static_cast<std::size_t>(chunk_bytes);
    const Stores stores = stores_named(stores_name, count * step);
    return each_chunk(from, count, step, [&](std::size_t i, std::size_t offset) {
        return kvcache::copy_chunk(level, stores, from[i].begin() + offset, into[i].begin() + offset, step);
    });
}

py::bytes sum_chunks(const py::sequence& buffers, py::ssize_t chunk_bytes, const std::string& level_name) {
    const Level& level = level_named(level_name);
    const auto views = views_of(buffers, false, "source");
    const std::size_t count = count_chunks(views, chunk_bytes);
    const auto step = static_cast<std::size_t>(chunk_bytes);
    return each_chunk(views, count, step, [&](std::size_t i, std::size_t offset) {
        return kvcache::sum_chunk(level, views[i].begin() + offset, step);
    });
}

py::tuple level_names() {
    py::list names;
    for (const Level& level : levels()) names.append(level.name);
    return py::tuple(names);
}

}  // namespace

PYBIND11_MODULE(core, module) {
    module.doc() = "Copying and summing chunks of blocks in one pass. Use kvcache.sums.";
    module.def("copy_and_sum", &copy_and_sum, py::arg("sources"), py::arg("targets"), py::arg("chunk_bytes"),
               py::kw_only(), py::arg("level") = "", py::arg("stores") = "auto");
    module.def("sum_chunks", &sum_chunks, py::arg("buffers"), py::arg("chunk_bytes"), py::kw_only(),
               py::arg("level") = "");
    module.def("levels", &level_names);
}
