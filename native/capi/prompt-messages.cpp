#include "prompt-messages.h"

#include "dsv4-template.h"

#include "chat.h"

// Source: DeepSeek's encoding_dsv4.py.
void pyl_add_roles(const common_json & source, bool is_extended, bool is_developer_turn,
        common_chat_templates_inputs & inputs) {
    std::vector<common_chat_msg> out;
    const auto add = [&](const char * role, const std::string & content) {
        common_chat_msg msg;
        msg.role    = role;
        msg.content = content;
        out.push_back(msg);
    };
    size_t i = 0;
    for (auto & msg : inputs.messages) {
        const common_json & given        = source.at(i++);
        const bool          has_task     = given.contains("task");
        const std::string   task         = has_task ? given.at("task").get<std::string>() : "";
        const bool          is_developer = is_extended && is_developer_turn && msg.role == "developer";
        if (has_task && !dsv4_is_task(task)) {
            throw std::invalid_argument("unknown task '" + task + "'");
        }
        if (!is_extended && (has_task || msg.role == "latest_reminder")) {
            throw pyl_no_such_role("this chat template has neither tasks nor the role 'latest_reminder'");
        }
        if (is_developer) {
            add(DSV4_ROLE_TURN_END, "");
            msg.role = "user";
        }
        out.push_back(msg);
        if (is_developer) {
            add(DSV4_ROLE_TURN_END, "");
        }
        if (has_task) {
            add(DSV4_ROLE_TASK, task);
        }
    }
    inputs.messages = std::move(out);
}

void pyl_expect_task(common_chat_templates_inputs & inputs) {
    if (!inputs.messages.empty() && inputs.messages.back().role == DSV4_ROLE_TASK) {
        inputs.chat_template_kwargs["thinking"] = inputs.enable_thinking ? "true" : "false";
        inputs.enable_thinking = false;
        inputs.tool_choice     = COMMON_CHAT_TOOL_CHOICE_NONE;
    }
}

void pyl_set_header(bool is_extended, const common_chat_templates_inputs & inputs, common_chat_params & params) {
    if (is_extended && inputs.add_generation_prompt && params.generation_prompt.empty()) {
        params.generation_prompt = inputs.enable_thinking ? "<｜Assistant｜><think>" : "<｜Assistant｜></think>";
    }
}
