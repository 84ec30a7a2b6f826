// What DeepSeek's encoder knows of V4's chat format and upstream's template does not: turns of the role
// `latest_reminder`, turns that other user turns do not join, and the tokens of quick tasks.
//
// Called by dsv4-dialect.cpp for the template of an opened file, which the server uses too, and by pyl-chat.cpp for the
// library's. Which messages become what is pyl-chat.cpp's; the layout is said in docs/chat-format.md.
#pragma once

#include <string>
#include <vector>

// Pseudo-messages that an extended template understands, by role.
extern const char * const DSV4_ROLE_TURN_END; // the next user message begins a turn of its own
extern const char * const DSV4_ROLE_TASK;     // content: one of the tasks below; the answer is the task's

// Whether the text is a chat template of V4, by what upstream selects its DSML reader by.
bool dsv4_is_v4_template(const std::string & text);

// Whether dsv4_extend_template has been at it.
bool dsv4_is_extended_template(const std::string & text);

// Add the roles to a V4 template, of either generation. A text that is not laid out as upstream's is returned as it is.
std::string dsv4_extend_template(const std::string & text);

bool dsv4_is_task(const std::string & name); // action, query, authority, domain, title, read_url

// The named tokens that these roles and tasks put into a prompt.
std::vector<std::string> dsv4_added_tokens();
