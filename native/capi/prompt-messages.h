// The roles and quick tasks of V4's format in a conversation: what upstream's messages become for an extended template
// (dsv4-template.h), and what that means for the answer.
//
// Called by pyl-chat.cpp for Python and by native/server for the server, so that both mean the same.

#pragma once

#include <stdexcept>

class common_json;
struct common_chat_params;
struct common_chat_templates_inputs;

// The request is well-formed, and the template cannot say it.
struct pyl_no_such_role : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// Add what source, the JSON that inputs.messages were read from, says beyond them. With is_developer_turn a developer's
// message is a user's turn of its own, as in DeepSeek's encoder; otherwise upstream makes it the system's.
// Throws pyl_no_such_role, and std::invalid_argument for a task that there is not.
void pyl_add_roles(const common_json & source, bool is_extended, bool is_developer_turn,
        common_chat_templates_inputs & inputs);

// Once everything else of inputs is set: the answer to a quick task is text, whatever the conversation before it was.
void pyl_expect_task(common_chat_templates_inputs & inputs);

// After the template was applied: behind a task or a reminder the answer begins without a header, and is read as if there
// was one.
void pyl_set_header(bool is_extended, const common_chat_templates_inputs & inputs, common_chat_params & params);
