// The one program of `cargo xtask cluster`'s image, for every part of the test:
// `pause` waits (the sandbox of a pod); `serve` answers in plaintext (8080), HTTP/2 in plaintext (8081) and TLS (8443,
// HTTP/2 by ALPN); `call` calls it; `sink` takes OTLP/JSON (4319) and prints what a test asks of it, a line a span.
package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"math/big"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

func certificate() tls.Certificate {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(err)
	now := time.Now()
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: now.Add(-time.Hour), NotAfter: now.Add(24 * time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	check(err)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "error:", err)
		os.Exit(1)
	}
}

// serve answers every path with the name of this pod.
func serve() {
	answer := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		if strings.Contains(r.URL.Path, "missing") {
			w.WriteHeader(http.StatusNotFound)
		}
		fmt.Fprintln(w, os.Getenv("HOSTNAME"))
	})
	clear := new(http.Protocols)
	clear.SetUnencryptedHTTP2(true)
	failed := make(chan error, 3)
	go func() { failed <- (&http.Server{Addr: ":8080", Handler: answer}).ListenAndServe() }()
	go func() { failed <- (&http.Server{Addr: ":8081", Handler: answer, Protocols: clear}).ListenAndServe() }()
	go func() {
		config := &tls.Config{Certificates: []tls.Certificate{certificate()}}
		failed <- (&http.Server{Addr: ":8443", Handler: answer, TLSConfig: config}).ListenAndServeTLS("", "")
	}()
	stop, _ := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	select {
	case err := <-failed:
		check(err)
	case <-stop.Done():
	}
}

func client(kind string) (*http.Client, string) {
	transport := &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}
	transport.Protocols = new(http.Protocols)
	switch kind {
	case "plain":
		transport.Protocols.SetHTTP1(true)
		return &http.Client{Transport: transport, Timeout: 5 * time.Second}, "http://%s:8080%s"
	case "h2c":
		transport.Protocols.SetUnencryptedHTTP2(true)
		return &http.Client{Transport: transport, Timeout: 5 * time.Second}, "http://%s:8081%s"
	case "tls":
		transport.Protocols.SetHTTP1(true)
	case "h2":
		transport.Protocols.SetHTTP2(true)
	default:
		check(fmt.Errorf("no kind %q", kind))
	}
	return &http.Client{Transport: transport, Timeout: 5 * time.Second}, "https://%s:8443%s"
}

// call KINDS ADDRESS PATH COUNT INTERVAL_MS: COUNT calls of each kind, 0 is without end. The user agent names
// this pod, the kind and the number of the call: what the agent says can be held against it. Prints a line a
// kind: kind, calls, errors.
func call(args []string) {
	if len(args) != 5 {
		check(fmt.Errorf("call KINDS ADDRESS PATH COUNT INTERVAL_MS"))
	}
	count, err := strconv.Atoi(args[3])
	check(err)
	interval, err := strconv.Atoi(args[4])
	check(err)
	failed := 0
	for _, kind := range strings.Split(args[0], ",") {
		client, url := client(kind)
		done, errors := 0, 0
		for n := 0; count == 0 || n < count; n++ {
			request, err := http.NewRequest("GET", fmt.Sprintf(url, args[1], args[2]), nil)
			check(err)
			request.Header.Set("User-Agent", fmt.Sprintf("%s %s %s %d", agent, os.Getenv("HOSTNAME"), kind, n))
			response, err := client.Do(request)
			if err != nil {
				fmt.Fprintln(os.Stderr, err)
				errors++
			} else {
				io.Copy(io.Discard, response.Body)
				response.Body.Close()
				done++
			}
			time.Sleep(time.Duration(interval) * time.Millisecond)
		}
		fmt.Println(kind, done, errors)
		failed += errors
	}
	if failed > 0 {
		os.Exit(1)
	}
}

// What callers name themselves by.
const agent = "cluster-test"

type attribute struct {
	Key   string
	Value map[string]any
}

type export struct {
	ResourceSpans []struct {
		Resource   struct{ Attributes []attribute }
		ScopeSpans []struct {
			Spans []struct {
				Kind              int
				StartTimeUnixNano string
				Attributes        []attribute
			}
		}
	}
}

func flat(into map[string]any, attributes []attribute) {
	for _, a := range attributes {
		for _, value := range a.Value {
			into[a.Key] = value
		}
	}
}

// sink prints the spans of `call`: their attributes and their resource's in one object.
func sink() {
	var printing sync.Mutex
	out := json.NewEncoder(os.Stdout)
	check(http.ListenAndServe(":4319", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var all export
		if err := json.NewDecoder(r.Body).Decode(&all); err != nil {
			fmt.Fprintln(os.Stderr, "no OTLP:", err)
			w.WriteHeader(http.StatusBadRequest)
			return
		}
		printing.Lock()
		defer printing.Unlock()
		for _, resource := range all.ResourceSpans {
			for _, scope := range resource.ScopeSpans {
				for _, span := range scope.Spans {
					line := map[string]any{"side": map[int]string{2: "server", 3: "client"}[span.Kind], "start": span.StartTimeUnixNano, "received": time.Now().UnixNano()}
					flat(line, resource.Resource.Attributes)
					flat(line, span.Attributes)
					if name, _ := line["user_agent.original"].(string); strings.HasPrefix(name, agent+" ") {
						out.Encode(line)
					}
				}
			}
		}
		w.Header().Set("Content-Type", "application/json")
		w.Write([]byte("{}"))
	})))
}

func main() {
	switch {
	case len(os.Args) > 1 && os.Args[1] == "pause":
		stop, _ := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
		<-stop.Done()
	case len(os.Args) > 1 && os.Args[1] == "serve":
		serve()
	case len(os.Args) > 1 && os.Args[1] == "call":
		call(os.Args[2:])
	case len(os.Args) > 1 && os.Args[1] == "sink":
		sink()
	default:
		check(fmt.Errorf("pause, serve, call or sink"))
	}
}
