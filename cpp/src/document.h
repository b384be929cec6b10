// JSON from files: read into what can be taken apart without memory, and asked for what has to be there.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "error.h"

namespace rx {

// A document. nlohmann's destructors take memory to free what is nested, and end the program where there is none: they
// are given nothing that is nested.
struct Document {
    nlohmann::json top;

    Document() = default;
    Document(const Document &) = delete;
    Document &operator=(const Document &) = delete;
    ~Document() { take_apart(top); }

  private:
    static void take_apart(nlohmann::json &value) {
        if (auto *array = value.get_ptr<nlohmann::json::array_t *>()) {
            for (nlohmann::json &part : *array) take_apart(part);
            array->clear();
        } else if (auto *object = value.get_ptr<nlohmann::json::object_t *>()) {
            for (auto &part : *object) take_apart(part.second);
            object->clear();
        }
    }
};

// Says what is wrong with it, in the words of the Python runtime's reader.
struct Damaged {
    std::string reason;
};

// A value and where it lies. Every way to read it throws Damaged when it is something else.
class Part {
  public:
    Part(const nlohmann::json &value, std::string path) : value_(value), path_(std::move(path)) {}

    bool is_null() const { return value_.is_null(); }
    bool has(const char *key) const { return value_.contains(key); }
    bool is_object() const { return value_.is_object(); }

    // A key of an object, which must be there.
    Part operator[](const char *key) const {
        object();
        if (!value_.contains(key)) damaged("Object missing required field `" + std::string(key) + "`");
        return {value_.at(key), path_ + "." + key};
    }

    const Part &object(const char *expected = "object") const { return expect(value_.is_object(), expected); }

    const Part &only(std::initializer_list<const char *> keys) const {
        object();
        for (const auto &item : value_.items()) {
            bool known = false;
            for (const char *key : keys) known = known || item.key() == key;
            if (!known) damaged("Object contains unknown field `" + printable(item.key()) + "`");
        }
        return *this;
    }

    std::string text(const char *expected = "str") const {
        expect(value_.is_string(), expected);
        return value_.get<std::string>();
    }

    std::optional<std::string> text_or_null() const {
        return is_null() ? std::nullopt : std::optional(text("str | null"));
    }

    std::string one_of(std::initializer_list<const char *> values) const {
        const std::string found = text();
        for (const char *value : values)
            if (found == value) return found;
        damaged("Invalid enum value '" + printable(found) + "'");
    }

    bool boolean() const {
        expect(value_.is_boolean(), "bool");
        return value_.get<bool>();
    }

    std::int64_t integer(std::int64_t least = std::numeric_limits<std::int64_t>::min(),
                         std::int64_t most = std::numeric_limits<std::int64_t>::max(),
                         const char *expected = "int") const {
        expect(value_.is_number_integer(), expected);
        constexpr auto LARGEST = std::numeric_limits<std::int64_t>::max();
        const bool large = value_.is_number_unsigned() && value_.get<std::uint64_t>() > std::uint64_t(LARGEST);
        const std::int64_t found = large ? LARGEST : value_.get<std::int64_t>();
        if (found < least) damaged("Expected `int` >= " + std::to_string(least));
        if (found > most || large) damaged("Expected `int` <= " + std::to_string(most));
        return found;
    }

    double number(const char *expected = "float") const {
        expect(value_.is_number(), expected);
        return value_.get<double>();
    }

    double number(double least, double most, const char *least_text, const char *most_text) const {
        const double found = number();
        if (!(found >= least)) damaged(std::string("Expected `float` >= ") + least_text);
        if (!(found <= most)) damaged(std::string("Expected `float` <= ") + most_text);
        return found;
    }

    std::vector<Part> array(const char *expected = "array") const {
        expect(value_.is_array(), expected);
        std::vector<Part> parts;
        for (std::size_t i = 0; i < value_.size(); ++i)
            parts.emplace_back(value_[i], path_ + "[" + std::to_string(i) + "]");
        return parts;
    }

    std::vector<Part> array_of(std::size_t length, const char *expected = "array") const {
        std::vector<Part> parts = array(expected);
        if (parts.size() != length)
            damaged("Expected `array` of length " + std::to_string(length) + ", got " + std::to_string(parts.size()));
        return parts;
    }

    std::vector<std::pair<std::string, Part>> items() const {
        object();
        std::vector<std::pair<std::string, Part>> parts;
        for (const auto &item : value_.items()) parts.emplace_back(item.key(), Part(item.value(), path_ + "[...]"));
        return parts;
    }

    [[noreturn]] void damaged(const std::string &reason) const {
        throw Damaged{path_ == "$" ? reason : reason + " - at `" + path_ + "`"};
    }

  private:
    const Part &expect(bool right, const char *expected) const {
        if (!right) damaged(std::string("Expected `") + expected + "`, got `" + kind() + "`");
        return *this;
    }

    const char *kind() const {
        switch (value_.type()) {
            case nlohmann::json::value_t::null: return "null";
            case nlohmann::json::value_t::boolean: return "bool";
            case nlohmann::json::value_t::string: return "str";
            case nlohmann::json::value_t::array: return "array";
            case nlohmann::json::value_t::object: return "object";
            case nlohmann::json::value_t::number_float: return "float";
            default: return "int";
        }
    }

    const nlohmann::json &value_;
    std::string path_;
};

// Read `data` into `top`. Damaged when it is no JSON, or nested deeper than what rxdeploy reads ever is. Of a name that
// comes twice the last one counts, as for the Python runtime; with `unique` it is Damaged: whoever reads it otherwise
// could be told something else.
void decode(std::string_view data, nlohmann::json &top, bool unique = false);

}  // namespace rx
