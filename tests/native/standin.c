/* A stand-in for librats_tls in tests: its six functions and its structures over OpenSSL, and no attestation at all.
 *
 * It behaves like the library where programs can see it, the unfortunate parts included; the contract suite holds both
 * to that. Beyond it, it ends the process when two threads enter one handle, or one comes after the cleanup: the library
 * would corrupt memory, sometimes.
 *
 * Its evidence is a blob that says TEST, made by nobody and believed by no real verifier. It loads only where
 * RATSTLS_STANDIN=1 says that this is a test. Plug-ins are the file names in the four directories beside it, and these
 * variables, read at each rats_tls_init, say what its attester and verifier do:
 *
 *   STANDIN_BROKEN=1|crash|init    exit(1) at load, abort() at load, abort() in rats_tls_init
 *   STANDIN_MR_ENCLAVE, STANDIN_MR_SIGNER, STANDIN_ATTRIBUTES (hexadecimal), STANDIN_PRODUCT_ID, STANDIN_SECURITY_VERSION
 *   STANDIN_EVIDENCE               one of the names in `spoils` below
 *   STANDIN_ATTESTER=fails|platform-fails|no-memory     rats_tls_init returns the library's codes for that
 *   STANDIN_ATTESTER_DELAY_MS, STANDIN_VERIFIER_DELAY_MS
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <openssl/err.h>
#include <openssl/evp.h>
#include <openssl/rand.h>
#include <openssl/ssl.h>
#include <openssl/x509v3.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <time.h>

#ifndef CONTEXT_SIZE
#define CONTEXT_SIZE 240 /* or 232, or 248: one build each; any other is a build that nobody knows */
#endif
#define HAS_CLAIMS (CONTEXT_SIZE != 232)
#define HAS_ENCLAVE_ID (CONTEXT_SIZE == 232 || CONTEXT_SIZE == 248)

typedef unsigned int code_t;
typedef int (*callback_t)(void *);
typedef struct { char *name; uint8_t *value; size_t value_size; } claim_t;

typedef struct {
	unsigned int api_version;
	unsigned long flags;
	int log_level;
	char tls_type[32], attester_type[32], verifier_type[32], crypto_type[32];
	int cert_algo;
#if HAS_ENCLAVE_ID
	uint64_t enclave_id;
#endif
#if HAS_CLAIMS
	claim_t *custom_claims;
	size_t custom_claims_length;
#endif
	struct { bool valid; uint8_t spid[16]; bool linkable; } epid;
	struct { bool valid; uint8_t cert_type; } ecdsa;
} conf_t;

typedef struct {
	int type;
#if HAS_CLAIMS
	claim_t *custom_claims;
	size_t custom_claims_length;
#endif
	uint64_t ehd[5];
	int quote_size;
	uint8_t *quote;
	union {
		struct { uint8_t *mr_enclave, *mr_signer; uint32_t product_id, security_version; uint8_t *attributes; } sgx;
		struct { uint8_t *value; uint32_t size; } csv[4];
		uint64_t room[10];
	};
} evidence_t;

struct context {
	conf_t config;
	unsigned long flags;
	callback_t user_callback;
	void *attester, *verifier, *tls_wrapper, *crypto_wrapper;
#if CONTEXT_SIZE > 248
	uint8_t unknown[CONTEXT_SIZE - 240];
#endif
};
_Static_assert(sizeof(struct context) == CONTEXT_SIZE, "the context's size tells the builds apart");
_Static_assert(sizeof(evidence_t) == (HAS_CLAIMS ? 160 : 144), "evidence");

struct handle {
	struct context core;
	atomic_flag is_entered;
	bool is_freed;
	SSL_CTX *sctx;
	SSL *ssl;
	int verifier_delay_ms;
};

enum { MUTUAL = 1, SERVER = 2 };
enum { DEBUG, INFO, WARN, ERROR, FATAL, NONE };
enum { UNKNOWN, SGX_ECDSA, TDX_ECDSA, CSV };
#define MINUS(enumerator) (0u - (code_t)(enumerator))
#define INVALID MINUS(2)
#define UNUSABLE_WRAPPER MINUS(10)
#define OPENSSL_CODE(result) (0x90000000u | ((code_t)(result) & 0x7fffffu))

struct context global_core_context;
int global_log_level = ERROR;

__attribute__((format(printf, 2, 3))) static void say(int level, const char *format, ...)
{
	static const char *const names[] = { "DEBUG", "INFO", "WARN", "ERROR", "FATAL" };
	FILE *out = level >= ERROR ? stderr : stdout;
	if (global_log_level > level)
		return;
	va_list arguments;
	va_start(arguments, format);
	fprintf(out, "[%s] ", names[level]);
	vfprintf(out, format, arguments);
	fputc('\n', out);
	va_end(arguments);
}

/* ---- plug-ins ---------------------------------------------------------------------------------------------------- */

enum { CRYPTO, ATTESTER, VERIFIER, TLS, KINDS };
static const struct { const char *directory, *prefix; } kinds[KINDS] = {
	{ "crypto-wrappers", "libcrypto_wrapper_" }, { "attesters", "libattester_" },
	{ "verifiers", "libverifier_" }, { "tls-wrappers", "libtls_wrapper_" },
};
static char plugins[KINDS][16][64];
static int plugin_counts[KINDS];

static void load_plugins(int kind, const char *library)
{
	char path[4096];
	snprintf(path, sizeof path, "%.*s/%s", (int)(strrchr(library, '/') - library), library, kinds[kind].directory);
	DIR *directory = opendir(path);
	for (struct dirent *entry; directory && (entry = readdir(directory)) && plugin_counts[kind] < 16;) {
		size_t prefix = strlen(kinds[kind].prefix), length = strlen(entry->d_name);
		if (length < prefix + 4 || strncmp(entry->d_name, kinds[kind].prefix, prefix) ||
		    strcmp(entry->d_name + length - 3, ".so"))
			continue;
		snprintf(plugins[kind][plugin_counts[kind]++], 64, "%.*s", (int)(length - prefix - 3), entry->d_name + prefix);
	}
	if (directory)
		closedir(directory);
	if (!plugin_counts[kind]) {
		say(FATAL, "no plug-in in %s", path);
		exit(1);
	}
}

static bool has_plugin(int kind, const char *name)
{
	for (int i = 0; i < plugin_counts[kind]; i++)
		if (!strcmp(plugins[kind][i], name))
			return true;
	return false;
}

/* Like the library with an empty name: take what proves most, of what there is. */
static bool choose_plugin(int kind, char *name)
{
	static const char *const preferred[] = { "openssl", "sgx_ecdsa", "nulltls", "nullverifier", "nullattester" };
	for (size_t i = 0; !name[0] && i < sizeof preferred / sizeof *preferred; i++)
		if (has_plugin(kind, preferred[i]))
			strcpy(name, preferred[i]);
	return has_plugin(kind, name);
}

__attribute__((constructor)) static void standin_load(void)
{
	static const char *const levels[] = { "debug", "info", "warn", "error", "fatal", "off" };
	const char *allowed = getenv("RATSTLS_STANDIN"), *broken = getenv("STANDIN_BROKEN");
	const char *level = getenv("RATS_TLS_GLOBAL_LOG_LEVEL");
	if (!allowed || strcmp(allowed, "1")) {
		fputs("this is the stand-in of a test, which attests nothing: set RATSTLS_STANDIN=1 in tests only\n", stderr);
		exit(1);
	}
	if (broken && !strcmp(broken, "crash"))
		abort();
	if (broken && strcmp(broken, "init")) {
		say(FATAL, "broken, as told");
		exit(1);
	}
	for (int i = 0; level && i <= NONE; i++)
		if (!strcasecmp(level, levels[i]))
			global_log_level = i;
	global_core_context.config.log_level = global_log_level;
	Dl_info self;
	dladdr(&global_core_context, &self);
	for (int kind = 0; kind < KINDS; kind++)
		load_plugins(kind, self.dli_fname);
}

/* ---- evidence ---------------------------------------------------------------------------------------------------- */

#define EVIDENCE_OID "2.25.308241985674312870561200987345612"
#define QUOTE_BYTES 436 /* of an SGX quote, version 3, before its signature */
#define SIGNATURE_BYTES 64
#define QUOTE_BUFFER_BYTES 8192

/* What an attester says: the quote that binds it to the key, and what the verifier is to hand to the callback. */
struct statement {
	char label[8];
	int type, quote_size;
	bool is_refused, has_null_fields;
	uint8_t mr_enclave[32], mr_signer[32], attributes[16];
	uint32_t product_id, security_version;
	uint8_t quote[QUOTE_BYTES + SIGNATURE_BYTES];
	uint8_t public_key_hash[32]; /* the claims follow: they and this are what the quote's report data covers */
};
#define CLAIMS_AT (offsetof(struct statement, public_key_hash) + 32)
#define COVERED_AT offsetof(struct statement, public_key_hash)

enum spoil {
	GOOD, NO_EVIDENCE, GARBAGE, CUT, HUGE_CERTIFICATE, OTHER_KEY, NO_REPORT_DATA, REVOKED, OUT_OF_DATE, NULL_FIELDS,
	SHORT_QUOTE, MISMATCH, OF_UNKNOWN, OF_TDX, OF_CSV, EXPIRED, NOT_YET_VALID, DEEP_CHAIN, SPOILS
};
static const char *const spoils[SPOILS] = {
	"good", "none", "garbage", "truncated", "huge", "other-key", "no-report-data", "revoked", "out-of-date", "null-fields",
	"short-quote", "mismatch", "unknown", "tdx_ecdsa", "csv", "expired", "not-yet-valid", "deep-chain",
};

static enum spoil wanted_spoil(void)
{
	const char *wanted = getenv("STANDIN_EVIDENCE");
	for (int i = 0; wanted && i < SPOILS; i++)
		if (!strcmp(wanted, spoils[i]))
			return (enum spoil)i;
	if (!wanted)
		return GOOD;
	fprintf(stderr, "standin: no STANDIN_EVIDENCE=%s\n", wanted);
	abort();
}

static int number_from(const char *name, int otherwise)
{
	const char *text = getenv(name);
	return text ? atoi(text) : otherwise;
}

static void bytes_from(const char *name, uint8_t *out, size_t size)
{
	const char *text = getenv(name);
	if (text && strlen(text) != 2 * size) {
		fprintf(stderr, "standin: %s has not %zu bytes\n", name, size);
		abort();
	}
	for (size_t i = 0; text && i < size; i++)
		sscanf(text + 2 * i, "%2hhx", out + i);
}

static void sha256(const uint8_t *data, size_t size, uint8_t out[32])
{
	EVP_Digest(data, size, out, NULL, EVP_sha256(), NULL);
}

static void hash_key(EVP_PKEY *key, uint8_t out[32])
{
	uint8_t *der = NULL;
	int size = i2d_PUBKEY(key, &der);
	sha256(der, size > 0 ? (size_t)size : 0, out);
	OPENSSL_free(der);
}

#if HAS_CLAIMS
static size_t append(uint8_t *to, size_t at, const void *bytes, uint32_t size)
{
	memcpy(to + at, &size, 4);
	memcpy(to + at + 4, bytes, size);
	return at + 4 + size;
}
#endif

static uint8_t *make_evidence(const conf_t *conf, EVP_PKEY *key, enum spoil spoil, size_t *size)
{
	size_t room = sizeof(struct statement) + (spoil == HUGE_CERTIFICATE ? 1 << 20 : 1 << 16), end = CLAIMS_AT;
	uint8_t *bytes = calloc(1, room);
	struct statement *statement = (struct statement *)bytes;
	strcpy(statement->label, "TEST");
	static const int types[SPOILS] = { [OF_UNKNOWN] = UNKNOWN + 1, [OF_TDX] = TDX_ECDSA + 1, [OF_CSV] = CSV + 1 };
	statement->type = types[spoil] ? types[spoil] - 1 : SGX_ECDSA;
	statement->quote_size = spoil == SHORT_QUOTE ? 100 : QUOTE_BYTES;
	statement->is_refused = spoil == REVOKED || spoil == OUT_OF_DATE;
	statement->has_null_fields = spoil == NULL_FIELDS;
	memset(statement->mr_enclave, 0x11, 32);
	memset(statement->mr_signer, 0x22, 32);
	memcpy(statement->attributes, "\5\0\0\0\0\0\0\0\3\0\0\0\0\0\0\0", 16); /* initialised, 64 bits, no debug; x87, SSE */
	bytes_from("STANDIN_MR_ENCLAVE", statement->mr_enclave, 32);
	bytes_from("STANDIN_MR_SIGNER", statement->mr_signer, 32);
	bytes_from("STANDIN_ATTRIBUTES", statement->attributes, 16);
	statement->product_id = (uint32_t)number_from("STANDIN_PRODUCT_ID", 1);
	statement->security_version = (uint32_t)number_from("STANDIN_SECURITY_VERSION", 2);
	hash_key(key, statement->public_key_hash);
	if (spoil == OTHER_KEY)
		statement->public_key_hash[0] ^= 1;
#if HAS_CLAIMS
	for (size_t i = 0; i < conf->custom_claims_length; i++) {
		const claim_t *claim = conf->custom_claims + i;
		end = append(bytes, end, claim->name, (uint32_t)strlen(claim->name));
		end = append(bytes, end, claim->value, (uint32_t)claim->value_size);
	}
#else
	(void)conf;
#endif
	/* Laid out as SGX does, so that a policy can compare fields and quote, but labelled for people. */
	uint8_t *quote = statement->quote, *body = quote + 48;
	uint16_t short_fields[2] = { (uint16_t)statement->product_id, (uint16_t)statement->security_version };
	uint32_t signature_size = SIGNATURE_BYTES;
	memcpy(quote, "\3\0\2\0", 4); /* version 3, ECDSA P-256 */
	memcpy(quote + 12, "TEST NO ENCLAVE!", 16);
	memcpy(quote + 28, "TEST NO ENCLAVE AT A", 20);
	memcpy(body + 48, statement->attributes, 16);
	memcpy(body + 64, statement->mr_enclave, 32);
	memcpy(body + 128, statement->mr_signer, 32);
	memcpy(body + 256, short_fields, 4);
	if (spoil != NO_REPORT_DATA)
		sha256(bytes + COVERED_AT, end - COVERED_AT, body + 320);
	memcpy(quote + 432, &signature_size, 4);
	memset(quote + QUOTE_BYTES, 'T', SIGNATURE_BYTES);
	if (spoil == MISMATCH)
		statement->mr_enclave[0] ^= 1;
	if (spoil == GARBAGE)
		RAND_bytes(bytes, (int)end);
	*size = spoil == CUT ? end / 2 : spoil == HUGE_CERTIFICATE ? room : end;
	return bytes;
}

static int ask_callback(struct handle *h, const struct statement *statement, claim_t *claims, size_t count)
{
	if (!h->core.user_callback)
		return 1;
	evidence_t evidence = { .type = statement ? statement->type : UNKNOWN };
	uint8_t *quote = calloc(1, QUOTE_BUFFER_BYTES);
	struct statement fields = { 0 };
	if (statement)
		fields = *statement;
#if HAS_CLAIMS
	evidence.custom_claims = claims;
	evidence.custom_claims_length = count;
#else
	(void)claims, (void)count;
#endif
	if (evidence.type == SGX_ECDSA) {
		memcpy(quote, fields.quote, sizeof fields.quote);
		evidence.quote = fields.has_null_fields ? NULL : quote;
		evidence.quote_size = fields.quote_size;
		evidence.sgx.product_id = fields.product_id;
		evidence.sgx.security_version = fields.security_version;
		if (!fields.has_null_fields) {
			evidence.sgx.mr_enclave = fields.mr_enclave;
			evidence.sgx.mr_signer = fields.mr_signer;
			evidence.sgx.attributes = fields.attributes;
		}
	} else if (evidence.type == CSV) {
		evidence.quote = quote;
		evidence.quote_size = 2548;
		memcpy(quote + 64, "TEST NO ENCLAVE!", 16);
		memcpy(quote + 144, fields.mr_enclave, 32);
		uint8_t *values[] = { quote + 64, quote + 80, quote + 144, quote + 176 };
		uint32_t sizes[] = { 16, 16, 32, 4 };
		for (int i = 0; i < 4; i++) {
			evidence.csv[i].value = values[i];
			evidence.csv[i].size = sizes[i];
		}
	}
	int verdict = h->core.user_callback(&evidence);
	memset(quote, 0xdd, QUOTE_BUFFER_BYTES); /* whoever kept a pointer shall see it */
	memset(&fields, 0xdd, sizeof fields);
	free(quote);
	return verdict;
}

/* Take the claims apart in place; each name gets its NUL where the next length began. */
static int read_claims(uint8_t *bytes, size_t size, claim_t *claims, size_t limit)
{
	size_t count = 0;
	for (size_t at = 0; at < size; count++) {
		uint8_t *parts[2];
		uint32_t lengths[2];
		for (int i = 0; i < 2; i++) {
			if (size - at < 4)
				return -1;
			memcpy(&lengths[i], bytes + at, 4);
			if (size - at - 4 < lengths[i])
				return -1;
			parts[i] = bytes + at + 4;
			at += 4 + lengths[i];
		}
		if (count == limit)
			return -1;
		parts[0][lengths[0]] = 0;
		claims[count] = (claim_t){ (char *)parts[0], parts[1], lengths[1] };
	}
	return (int)count;
}

static int judge_certificate(struct handle *h, X509 *certificate)
{
	const char *verifier = h->core.config.verifier_type;
	ASN1_OBJECT *oid = OBJ_txt2obj(EVIDENCE_OID, 1);
	int at = X509_get_ext_by_OBJ(certificate, oid, -1), accepted = 0, count = 0;
	ASN1_OBJECT_free(oid);
	if (!verifier[0]) /* the library's trap: the peer's evidence, or the lack of it, chooses who judges it */
		verifier = at < 0 ? "nullverifier" : "sgx_ecdsa";
	say(DEBUG, "verifier %s", verifier);
	if (h->verifier_delay_ms)
		nanosleep(&(struct timespec){ h->verifier_delay_ms / 1000, h->verifier_delay_ms % 1000 * 1000000L }, NULL);
	bool is_null = !strcmp(verifier, "nullverifier");
	if (at < 0)
		return is_null ? ask_callback(h, NULL, NULL, 0) : (say(ERROR, "the peer has no evidence"), 0);
	const ASN1_OCTET_STRING *extension = X509_EXTENSION_get_data(X509_get_ext(certificate, at));
	size_t size = (size_t)ASN1_STRING_length(extension);
	uint8_t *bytes = calloc(1, size + sizeof(struct statement)), digest[32];
	memcpy(bytes, ASN1_STRING_get0_data(extension), size);
	struct statement *statement = (struct statement *)bytes;
	claim_t claims[300];
	sha256(bytes + COVERED_AT, size > COVERED_AT ? size - COVERED_AT : 0, digest);
	if (size < CLAIMS_AT || strcmp(statement->label, "TEST"))
		say(ERROR, "malformed evidence");
	else if (!is_null && (statement->is_refused || memcmp(statement->quote + 48 + 320, digest, 32)))
		say(ERROR, "failed to verify evidence");
	else if ((count = read_claims(bytes + CLAIMS_AT, size - CLAIMS_AT, claims, 300)) < 0)
		say(ERROR, "malformed claims");
	else if (hash_key(X509_get0_pubkey(certificate), digest), memcmp(statement->public_key_hash, digest, 32))
		say(ERROR, "evidence of another key");
	else if (!(accepted = ask_callback(h, statement, claims, (size_t)count)))
		say(ERROR, "failed to verify user callback 0");
	free(bytes);
	return accepted != 0;
}

static int on_certificate(int is_preverified, X509_STORE_CTX *store)
{
	SSL *ssl = X509_STORE_CTX_get_ex_data(store, SSL_get_ex_data_X509_STORE_CTX_idx());
	struct handle *h = SSL_CTX_get_app_data(SSL_get_SSL_CTX(ssl));
	if (is_preverified)
		return judge_certificate(h, X509_STORE_CTX_get_current_cert(store));
	int error = X509_STORE_CTX_get_error(store);
	if (error == X509_V_ERR_DEPTH_ZERO_SELF_SIGNED_CERT)
		return 1; /* asked again, without this error, once the rest is checked */
	say(ERROR, "the certificate is no good: %d", error);
	return 0;
}

/* ---- certificate ------------------------------------------------------------------------------------------------- */

static EVP_PKEY *make_key(void)
{
	EVP_PKEY *key = NULL;
	EVP_PKEY_CTX *context = EVP_PKEY_CTX_new_id(EVP_PKEY_EC, NULL);
	EVP_PKEY_keygen_init(context);
	EVP_PKEY_CTX_set_ec_paramgen_curve_nid(context, NID_X9_62_prime256v1);
	EVP_PKEY_keygen(context, &key);
	EVP_PKEY_CTX_free(context);
	return key;
}

static void make_certificate(struct handle *h, enum spoil spoil)
{
	const long hour = 3600, year = 365 * 24 * hour;
	EVP_PKEY *key = make_key(), *issuer = spoil == DEEP_CHAIN ? make_key() : key;
	X509 *certificate = X509_new();
	X509_NAME *name = X509_get_subject_name(certificate);
	X509_set_version(certificate, 2);
	ASN1_INTEGER_set(X509_get_serialNumber(certificate), 1);
	X509_gmtime_adj(X509_getm_notBefore(certificate), spoil == NOT_YET_VALID ? 2 * hour : spoil == EXPIRED ? -year : -hour);
	X509_gmtime_adj(X509_getm_notAfter(certificate), spoil == EXPIRED ? -hour : year);
	X509_set_pubkey(certificate, key);
	X509_NAME_add_entry_by_txt(name, "CN", MBSTRING_ASC, (const uint8_t *)"TEST, attests nothing", -1, -1, 0);
	X509_set_issuer_name(certificate, name);
	if (issuer != key)
		X509_NAME_add_entry_by_txt(X509_get_issuer_name(certificate), "OU", MBSTRING_ASC, (const uint8_t *)"else", -1, -1, 0);
	X509_EXTENSION *extension = X509V3_EXT_conf_nid(NULL, NULL, NID_basic_constraints, "CA:FALSE");
	X509_add_ext(certificate, extension, -1);
	X509_EXTENSION_free(extension);
	if (strcmp(h->core.config.attester_type, "nullattester") && spoil != NO_EVIDENCE) {
		size_t size;
		uint8_t *evidence = make_evidence(&h->core.config, key, spoil, &size);
		ASN1_OCTET_STRING *data = ASN1_OCTET_STRING_new();
		ASN1_OBJECT *oid = OBJ_txt2obj(EVIDENCE_OID, 1);
		ASN1_OCTET_STRING_set(data, evidence, (int)size);
		extension = X509_EXTENSION_create_by_OBJ(NULL, oid, 0, data);
		X509_add_ext(certificate, extension, -1);
		X509_EXTENSION_free(extension);
		ASN1_OBJECT_free(oid);
		ASN1_OCTET_STRING_free(data);
		free(evidence);
	}
	X509_sign(certificate, issuer, EVP_sha256());
	SSL_CTX_use_certificate(h->sctx, certificate);
	SSL_CTX_use_PrivateKey(h->sctx, key);
	for (int i = 0; spoil == DEEP_CHAIN && i < 100; i++)
		SSL_CTX_add_extra_chain_cert(h->sctx, X509_dup(certificate));
	if (issuer != key)
		EVP_PKEY_free(issuer);
	EVP_PKEY_free(key);
	X509_free(certificate);
}

/* ---- the interface ----------------------------------------------------------------------------------------------- */

static void enter(struct handle *h)
{
	if (atomic_flag_test_and_set(&h->is_entered) || h->is_freed) {
		fputs(h->is_freed ? "standin: a handle is used after its cleanup\n"
				  : "standin: two threads are inside one handle\n", stderr);
		abort();
	}
}

static code_t leave(struct handle *h, code_t code)
{
	atomic_flag_clear(&h->is_entered);
	return code;
}

#if HAS_CLAIMS
void free_claims_list(claim_t *claims, size_t count)
{
	for (size_t i = 0; i < count; i++) {
		free(claims[i].name);
		free(claims[i].value);
	}
	free(claims);
}

claim_t *clone_claims_list(const claim_t *claims, size_t count)
{
	claim_t *copies = calloc(count, sizeof *copies);
	for (size_t i = 0; i < count; i++) {
		copies[i] = (claim_t){ strdup(claims[i].name), malloc(claims[i].value_size + 1), claims[i].value_size };
		memcpy(copies[i].value, claims[i].value, claims[i].value_size);
	}
	return copies;
}
#endif

code_t rats_tls_init(const conf_t *conf, struct handle **out)
{
	const char *broken = getenv("STANDIN_BROKEN");
	if (!conf || !out || conf->api_version > 1)
		return INVALID;
	if (broken) {
		say(ERROR, "a plug-in failed, and its place is empty"); /* as the library falls over such a place */
		abort();
	}
	struct handle *h = calloc(1, sizeof *h);
	h->core.config = *conf;
	h->verifier_delay_ms = number_from("STANDIN_VERIFIER_DELAY_MS", 0);
	if (conf->log_level < DEBUG || conf->log_level > NONE)
		h->core.config.log_level = global_core_context.config.log_level;
	global_log_level = h->core.config.log_level;
	const char *attester = getenv("STANDIN_ATTESTER");
	code_t code = 0;
	char verifier[32];
	strcpy(verifier, conf->verifier_type);
	if (attester && !strcmp(attester, "no-memory"))
		code = 3; /* as the library leaks it: without a sign */
	else if (!choose_plugin(CRYPTO, h->core.config.crypto_type))
		code = UNUSABLE_WRAPPER;
	else if (!choose_plugin(ATTESTER, h->core.config.attester_type) || !choose_plugin(VERIFIER, verifier))
		code = INVALID;
	else if (!choose_plugin(TLS, h->core.config.tls_type) || strcmp(h->core.config.tls_type, "openssl"))
		code = UNUSABLE_WRAPPER;
	else if (conf->flags & (MUTUAL | SERVER) && attester)
		code = strcmp(attester, "fails") ? 0xa0000000u | 0xe019u : MINUS(0x20000003);
	if (code) {
		free(h);
		return code;
	}
#if HAS_CLAIMS
	h->core.config.custom_claims = clone_claims_list(conf->custom_claims, conf->custom_claims_length);
#endif
	h->sctx = SSL_CTX_new(conf->flags & SERVER ? TLS_server_method() : TLS_client_method());
	SSL_CTX_set_app_data(h->sctx, h);
	if (conf->flags & (MUTUAL | SERVER)) {
		int delay_ms = number_from("STANDIN_ATTESTER_DELAY_MS", 0);
		nanosleep(&(struct timespec){ delay_ms / 1000, delay_ms % 1000 * 1000000L }, NULL);
		make_certificate(h, wanted_spoil());
	}
	*out = h;
	return 0;
}

code_t rats_tls_set_verification_callback(struct handle **h, callback_t callback)
{
	enter(*h);
	(*h)->core.user_callback = callback;
	return leave(*h, 0);
}

code_t rats_tls_negotiate(struct handle *h, int fd)
{
	if (!h || fd < 0)
		return INVALID;
	enter(h);
	bool is_server = h->core.config.flags & SERVER, is_mutual = h->core.config.flags & MUTUAL;
	if (!is_server || is_mutual)
		SSL_CTX_set_verify(h->sctx, SSL_VERIFY_PEER | (is_server ? SSL_VERIFY_FAIL_IF_NO_PEER_CERT : 0), on_certificate);
	SSL *ssl = SSL_new(h->sctx);
	SSL_set_fd(ssl, fd);
	ERR_clear_error();
	int result = is_server ? SSL_accept(ssl) : SSL_connect(ssl);
	if (result != 1) { /* and the SSL is lost, as in the library */
		say(ERROR, "failed to negotiate %d, SSL_get_error(): %d", result, SSL_get_error(ssl, result));
		return leave(h, OPENSSL_CODE(result));
	}
	h->ssl = ssl;
	return leave(h, 0);
}

static code_t move(struct handle *h, void *buffer, size_t *size, bool is_write)
{
	if (!h || !buffer || !size)
		return INVALID;
	enter(h);
	if (!h->ssl)
		return leave(h, INVALID);
	ERR_clear_error();
	int done = is_write ? SSL_write(h->ssl, buffer, (int)*size) : SSL_read(h->ssl, buffer, (int)*size);
	if (done <= 0) {
		say(ERROR, "SSL_%s() failed: %d, SSL_get_error(): %d", is_write ? "write" : "read", done, SSL_get_error(h->ssl, done));
		return leave(h, INVALID);
	}
	*size = (size_t)done;
	return leave(h, 0);
}

code_t rats_tls_receive(struct handle *h, void *buffer, size_t *size)
{
	return move(h, buffer, size, false);
}

code_t rats_tls_transmit(struct handle *h, void *buffer, size_t *size)
{
	return move(h, buffer, size, true);
}

/* The handle itself stays, so that a use after this is seen for sure. */
code_t rats_tls_cleanup(struct handle *h)
{
	if (!h)
		return INVALID;
	enter(h);
	if (h->ssl) {
		SSL_shutdown(h->ssl);
		SSL_free(h->ssl);
	}
	SSL_CTX_free(h->sctx);
#if HAS_CLAIMS
	free_claims_list(h->core.config.custom_claims, h->core.config.custom_claims_length);
#endif
	h->is_freed = true;
	return leave(h, 0);
}
