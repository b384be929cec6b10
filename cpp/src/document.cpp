#include "document.h"

#include <algorithm>

namespace rx {
namespace {

using nlohmann::json;

constexpr std::size_t DEEPEST = 200;  // nothing that rxdeploy reads is nested as deep as this

// What nlohmann's parser calls: puts a document together.
class Builder {
  public:
    Builder(json &top, bool unique) : next_(&top), unique_(unique) {}

    bool null() { return put(nullptr); }
    bool boolean(bool value) { return put(value); }
    bool number_integer(json::number_integer_t value) { return put(value); }
    bool number_unsigned(json::number_unsigned_t value) { return put(value); }
    bool number_float(json::number_float_t value, const std::string &) { return put(value); }
    bool string(std::string &value) { return put(std::move(value)); }
    bool binary(json::binary_t &) { return false; }  // JSON has none
    bool key(std::string &name) {
        if (unique_ && open_.back()->contains(name)) throw Damaged{"it has a name twice: " + printable(name.substr(0, 99))};
        next_ = &(*open_.back())[name];
        return true;
    }
    bool start_object(std::size_t) { return open(json::value_t::object); }
    bool start_array(std::size_t) { return open(json::value_t::array); }
    bool end_object() { return close(); }
    bool end_array() { return close(); }
    bool parse_error(std::size_t, const std::string &, const json::exception &error) {
        // "[json.exception.parse_error.101] parse error at line 3, column 5: ..."
        const std::string text = error.what();
        throw Damaged{"JSON is malformed: " + printable(text.substr(std::min(text.find("] ") + 2, text.size())))};
    }

  private:
    // Where the next value goes.
    json &place() {
        if (open_.empty() || open_.back()->is_object()) return *next_;
        return open_.back()->get_ref<json::array_t &>().emplace_back();
    }

    template <typename T>
    bool put(T &&value) {
        json &to = place();
        if (to.is_structured()) Document().top.swap(to);  // a name that comes twice: the last one counts
        to = std::forward<T>(value);
        return true;
    }

    bool open(json::value_t type) {
        if (open_.size() >= DEEPEST) throw Damaged{"it is nested too deep"};
        json &to = place();
        Document().top.swap(to);
        to = type;
        open_.push_back(&to);
        return true;
    }

    bool close() {
        open_.pop_back();
        return true;
    }

    json *next_;
    const bool unique_;
    std::vector<json *> open_;
};

}  // namespace

void decode(std::string_view data, json &top, bool unique) {
    // nlohmann's parser would take a NUL for the end, whatever comes behind it.
    if (data.find('\0') != std::string_view::npos) throw Damaged{"JSON is malformed: it has a NUL in it"};
    // msgspec takes no byte order mark, nlohmann's parser would skip one.
    if (!data.empty() && static_cast<unsigned char>(data[0]) == 0xef) throw Damaged{"it begins with no JSON"};
    Builder builder(top, unique);
    json::sax_parse(data.begin(), data.end(), &builder);
}

}  // namespace rx
