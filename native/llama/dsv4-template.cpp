#include "dsv4-template.h"

#include <algorithm>
#include <array>

const char * const DSV4_ROLE_TURN_END = "turn_end";
const char * const DSV4_ROLE_TASK     = "task";

static const std::array<const char *, 6> TASKS = { "action", "query", "authority", "domain", "title", "read_url" };

// The first line of an extended template.
static const char * const MARK = "{#- with the roles latest_reminder and task -#}\n";

struct edit {
    const char * before;
    const char * after;
};

// `state.lead` says what stands where an assistant's header would: nothing, a header that a reminder came behind, or
// the token of a task. Source: DeepSeek's encoding_dsv4.py, render_message.
static const edit EDITS[] = {
    {
        "namespace(in_user=false)",
        "namespace(in_user=false, lead='')",
    },
    {
        "  {%- if message['role'] == 'user' or message['role'] == 'developer' -%}\n",

        "  {%- if message['role'] == 'user' or message['role'] == 'developer' -%}\n"
        "    {%- set state.lead = '' -%}\n",
    },
    {
        "  {%- elif message['role'] == 'tool' -%}\n",

        "  {%- elif message['role'] == 'tool' -%}\n"
        "    {%- set state.lead = '' -%}\n",
    },
    {
        "  {%- elif message['role'] == 'assistant' -%}\n"
        "    {%- set state.in_user = false -%}\n"
        "    {{- '<｜Assistant｜>' -}}\n",

        "  {%- elif message['role'] == 'turn_end' -%}\n"
        "    {%- set state.in_user = false -%}\n"
        "  {%- elif message['role'] == 'latest_reminder' -%}\n"
        "    {%- if loop.index0 > 0 and messages[loop.index0 - 1]['role'] in ['user', 'tool', 'turn_end'] -%}\n"
        "      {{- '<｜Assistant｜>' -}}\n"
        "      {%- if thinking and ((not drop_thinking) or has_tools or ns.has_tool_calls or loop.index0 > last_user_idx.value) -%}\n"
        "        {{- thinking_start_token -}}\n"
        "      {%- else -%}\n"
        "        {{- thinking_end_token -}}\n"
        "      {%- endif -%}\n"
        "      {%- set state.lead = 'header' -%}\n"
        "    {%- endif -%}\n"
        "    {%- set state.in_user = false -%}\n"
        "    {{- '<｜latest_reminder｜>' -}}\n"
        "    {{- message['content'] or '' -}}\n"
        "  {%- elif message['role'] == 'task' -%}\n"
        "    {%- if message['content'] == 'action' -%}\n"
        "      {{- '<｜Assistant｜>' -}}\n"
        "      {%- if thinking -%}\n"
        "        {{- thinking_start_token -}}\n"
        "      {%- else -%}\n"
        "        {{- thinking_end_token -}}\n"
        "      {%- endif -%}\n"
        "      {{- '<｜action｜>' -}}\n"
        "    {%- elif message['content'] == 'query' -%}\n"
        "      {{- '<｜query｜>' -}}\n"
        "    {%- elif message['content'] == 'authority' -%}\n"
        "      {{- '<｜authority｜>' -}}\n"
        "    {%- elif message['content'] == 'domain' -%}\n"
        "      {{- '<｜domain｜>' -}}\n"
        "    {%- elif message['content'] == 'title' -%}\n"
        "      {{- '<｜title｜>' -}}\n"
        "    {%- else -%}\n"
        "      {{- '<｜read_url｜>' -}}\n"
        "    {%- endif -%}\n"
        "    {%- set state.in_user = false -%}\n"
        "    {%- set state.lead = 'task' -%}\n"
        "  {%- elif message['role'] == 'assistant' -%}\n"
        "    {%- set state.in_user = false -%}\n"
        "    {%- set lead = state.lead -%}\n"
        "    {%- set state.lead = '' -%}\n"
        "    {%- if lead == '' -%}\n"
        "      {{- '<｜Assistant｜>' -}}\n"
        "    {%- endif -%}\n",
    },
    {
        "    {%- if keep_reasoning -%}\n"
        "      {{- thinking_start_token -}}\n",

        "    {%- if lead == 'task' -%}\n"
        "    {%- elif keep_reasoning -%}\n"
        "      {%- if lead == '' -%}\n"
        "        {{- thinking_start_token -}}\n"
        "      {%- endif -%}\n",
    },
    {
        "      {{- thinking_end_token -}}\n"
        "    {%- else -%}\n"
        "      {{- thinking_end_token -}}\n"
        "    {%- endif -%}\n"
        "    {%- if message['content'] is defined",

        "      {{- thinking_end_token -}}\n"
        "    {%- elif lead == '' -%}\n"
        "      {{- thinking_end_token -}}\n"
        "    {%- endif -%}\n"
        "    {%- if message['content'] is defined",
    },
    {
        "    {{- '<｜end▁of▁sentence｜>' -}}\n"
        "  {%- endif -%}\n",

        "    {{- '<｜end▁of▁sentence｜>' -}}\n"
        "  {%- elif message['role'] != 'system' -%}\n"
        "    {{- raise_exception('the format of DeepSeek-V4 has no role ' + message['role']) -}}\n"
        "  {%- endif -%}\n",
    },
    {
        "{%- if add_generation_prompt -%}\n",
        "{%- if add_generation_prompt and state.lead == '' -%}\n",
    },
};

bool dsv4_is_task(const std::string & name) {
    return std::find(TASKS.begin(), TASKS.end(), name) != TASKS.end();
}

std::vector<std::string> dsv4_added_tokens() {
    std::vector<std::string> tokens = { "<｜latest_reminder｜>" };
    for (const char * task : TASKS) {
        tokens.push_back(std::string("<｜") + task + "｜>");
    }
    return tokens;
}

bool dsv4_is_v4_template(const std::string & text) {
    return text.find("dsml_token") != std::string::npos;
}

bool dsv4_is_extended_template(const std::string & text) {
    return text.compare(0, std::string(MARK).size(), MARK) == 0;
}

std::string dsv4_extend_template(const std::string & text) {
    if (!dsv4_is_v4_template(text) || dsv4_is_extended_template(text)) {
        return text;
    }
    std::string out = text;
    for (const auto & edit : EDITS) {
        const std::string before = edit.before;
        const size_t pos = out.find(before);
        if (pos == std::string::npos || out.find(before, pos + 1) != std::string::npos) {
            return text;
        }
        out.replace(pos, before.size(), edit.after);
    }
    return MARK + out;
}
