/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
#define _GNU_SOURCE
#include "cli/cli.h"

#include <string.h>

static const struct cli_verb *const main_verbs[] = {
	&cli_serve, &cli_mount, &cli_copy, &cli_info, &cli_doctor, &cli_status, &cli_flush, &cli_wait, &cli_stop,
	&cli_pull, &cli_pin, &cli_unpin, &cli_evict, &cli_check, &cli_page, &cli_bench,
};

/* Words that later versions give a meaning; nothing else may take them. */
static const char *const main_reserved[] = {
	"finalise", "seed", "leech", "snapshot", "nbd", "ram-ul", "ram-dl",
	"delta", "tapisk",
};

static void main_welcome(void)
{
	puts("farpage makes bytes that are somewhere else a file here: used at once, pulled in the background, pushed back.");
	puts("Three commands to try:");
	puts("  farpage serve file:x.db --listen grpc://127.0.0.1:1337      # on one host: offer a file");
	puts("  farpage mount grpc://127.0.0.1:1337 dir                     # on the other: dir/region is that file");
	puts("  farpage doctor                                              # what this machine can do");
	puts("");
	puts("Verbs: serve mount copy info doctor status flush pull pin unpin wait evict stop check page bench; 'farpage VERB --help' lists options.");
	puts("The manual: farpage(1).");
}

static int main_help(void)
{
	puts("usage: farpage VERB [OPTIONS] [ARGUMENTS]\n\nverbs:");
	for (size_t i = 0; i < FAR_ARRAY_LEN(main_verbs); i++)
		printf("  %-8s %s\n", main_verbs[i]->name, main_verbs[i]->about);
	puts("\n'farpage VERB --help' lists a verb's options; farpage(1) says more.");
	return CLI_OK;
}

static int main_run(int argc, char **argv)
{
	const char *word = argv[1];

	if (strcmp(word, "--version") == 0 || strcmp(word, "-V") == 0) {
		printf("farpage %s\n", far_version());
		return CLI_OK;
	}
	if (strcmp(word, "--help") == 0 || strcmp(word, "-h") == 0 || strcmp(word, "help") == 0)
		return main_help();
	for (size_t i = 0; i < FAR_ARRAY_LEN(main_verbs); i++)
		if (strcmp(word, main_verbs[i]->name) == 0)
			return main_verbs[i]->run(argc - 1, argv + 1);
	for (size_t i = 0; i < FAR_ARRAY_LEN(main_reserved); i++) {
		if (strcmp(word, main_reserved[i]) == 0) {
			cli_say("farpage %s is not in this version. 'farpage --help' lists what is", word);
			return CLI_USAGE;
		}
	}
	cli_say("'%s' is not a verb of farpage: there is none of that name. 'farpage --help' lists them", word);
	return CLI_USAGE;
}

int main(int argc, char **argv)
{
	if (argc < 2) {
		main_welcome();
		return CLI_OK;
	}
	int code = main_run(argc, argv);
	if (fflush(stdout) != 0 && code == CLI_OK) {
		cli_say("cannot write to standard output: %s", far_strerror(errno));
		code = CLI_FAILED;
	}
	return code;
}
