// What a C++ program asks of its machine: exceptions, containers, floating point, threads.
#include <atomic>
#include <cmath>
#include <cstdio>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

int main() {
    std::map<std::string, int> words;
    std::istringstream text("a rose is a rose is a rose, says she");
    for (std::string word; text >> word;) words[word]++;
    words.erase("says"), words.erase("she");

    std::string caught;
    try {
        words.at("thorn");
    } catch (const std::out_of_range &error) {
        caught = error.what();
    }

    double sum = 0;
    for (int i = 1; i <= 1000; i++) sum += 1.0 / i;

    std::atomic<int> count{0};
    std::vector<std::thread> threads;
    for (int i = 0; i < 4; i++)
        threads.emplace_back([&] { for (int j = 0; j < 100000; j++) count++; });
    for (auto &thread : threads) thread.join();

    std::printf("caught: %s; words %zu; sum %.12g; threads %d\n", caught.c_str(), words.size(),
                sum, count.load());
}
